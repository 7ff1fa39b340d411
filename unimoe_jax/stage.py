"""A stage made ready: its model, parameters on the mesh, optimizer, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from unimoe_jax import lora
from unimoe_jax.checkpoint import open_source
from unimoe_jax.config import ModelConfig, RunConfig, StageConfig, Take
from unimoe_jax.data.batch import Batch, batch_spec
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.optim import Schedule, learning_rate, make_optimizer
from unimoe_jax.params import (
    Flat,
    ParamError,
    ParamInfo,
    declared,
    flatten,
    split,
    table,
)
from unimoe_jax.sharding import (
    ShardingError,
    check_divides,
    current_mesh,
    current_platform,
    data_shards,
    mesh_axes,
    param_sharding,
    replicated,
)
from unimoe_jax.train_step import TrainState, init_state
from unimoe_jax.upcycle import Source, Start, needed_sources, origin_of, start_of


def structs(spec: Any, sharding: Callable[[int], Any] = lambda rank: None) -> Any:
    """Array specs (shape, dtype) -> jax shape structs, None stays."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding(len(s.shape))),
        spec,
        is_leaf=lambda s: hasattr(s, "shape") and hasattr(s, "dtype"),
    )


def full_batch(model: ModelConfig, shards: int = 1) -> Batch:
    """Shape structs of a small batch that holds every pool of the model, to declare parameters."""
    capacity = dict.fromkeys(model.tokens_per_medium(), 1)
    return structs(batch_spec(model, shards, 8, shards, capacity))


def parameter_table(run: RunConfig, stage: StageConfig) -> dict[str, ParamInfo]:
    """Every parameter of the stage's model and what happens to it; computes nothing.

    Raises:
        ParamError: a parameter that no rule covers, or a rule that covers none.
        ShardingError: experts that the mesh in force cannot share out.
    """
    config = run.stage_model(stage)
    for module, moe in config.experts().items():
        check_divides(f"{moe_key(module)}.num_experts", moe.num_experts, "expert")
    model = UniMoE(config, LayerOptions(lora=config.lora))
    mesh = current_mesh()  # a batch must divide over its shards, even one that is never computed
    batch = full_batch(config, data_shards(mesh) if mesh else 1)
    shapes = declared(model, batch)
    try:
        return table(shapes, stage.train, run.precision)
    except ParamError as error:
        raise ParamError(f"stages.{stage.name}.{error}") from None


def moe_key(module: str) -> str:
    """The setting that gives `module` its experts."""
    return f"model.{'decoder' if module == 'decoder' else f'vision.{module}'}.moe"


@dataclass(frozen=True)
class Stage:
    """What the loop needs: models for training and scoring, tables, shardings, optimizer."""

    config: StageConfig
    model_config: ModelConfig
    model: UniMoE
    scorer: UniMoE
    infos: Mapping[str, ParamInfo]
    shardings: Mapping[str, NamedSharding]
    optimizer: optax.GradientTransformation
    schedule: Schedule
    steps: int

    def state_shardings(self, mesh: Mesh) -> TrainState:
        """Shardings of a TrainState: optimizer moments lie as their parameters do."""
        trained, _ = split(self.shardings, self.infos)
        shapes = jax.eval_shape(self.optimizer.init, self._trained_structs())

        def of(path, leaf):
            del leaf
            keys = [getattr(part, "key", None) for part in path]
            return next((trained[key] for key in keys if key in trained), replicated(mesh))

        same = replicated(mesh)
        moments = jax.tree_util.tree_map_with_path(of, shapes)
        return TrainState(same, trained, moments, same, same)

    def _trained_structs(self) -> Flat:
        trained, _ = split(self.infos, self.infos)
        return {p: jax.ShapeDtypeStruct(i.shape, jnp.dtype(i.dtype)) for p, i in trained.items()}

    def state_template(self, mesh: Mesh) -> TrainState:
        """Shape structs with shardings, to restore into and to compile with."""
        shapes = jax.eval_shape(lambda t: init_state(t, self.optimizer, 0), self._trained_structs())
        return jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            self.state_shardings(mesh),
        )

    def frozen_template(self) -> Flat:
        """Shape structs with shardings of the frozen parameters."""
        _, frozen = split(self.infos, self.infos)
        return {
            path: jax.ShapeDtypeStruct(
                info.shape, jnp.dtype(info.dtype), sharding=self.shardings[path]
            )
            for path, info in frozen.items()
        }


def build_stage(run: RunConfig, stage: StageConfig, mesh: Mesh, steps: int) -> Stage:
    """Models, parameter table, shardings and optimizer of a stage. Must run inside `use_mesh`.

    Raises:
        ParamError, ShardingError: rules or shapes that do not fit; the parameter is named. Or an
            exchange of tokens that the devices do not have.
    """
    config = run.stage_model(stage)
    for module, moe in config.experts().items():
        if moe.exchange == "ragged" and mesh_axes("expert") and current_platform() == "cpu":
            raise ShardingError(
                f"{moe_key(module)}.exchange = ragged: CPUs have no such collective; allowed "
                "there: auto | gather | all_to_all"
            )
    dtype = jnp.dtype(run.precision.compute)
    infos = parameter_table(run, stage)
    schedule = learning_rate(stage.optim, steps)
    return Stage(
        config=stage,
        model_config=config,
        model=UniMoE(config, LayerOptions(dtype=dtype, lora=config.lora, train=True)),
        scorer=UniMoE(config.answering, LayerOptions(dtype=dtype, lora=config.lora)),
        infos=infos,
        shardings={
            path: param_sharding(mesh, path, info.shape, info.axes) for path, info in infos.items()
        },
        optimizer=make_optimizer(stage.optim, schedule, infos),
        schedule=schedule,
        steps=steps,
    )


# ------------------------------------------------------------------------------ parameters


def open_sources(run_dir: Path, stage: StageConfig) -> dict[str, Source]:
    """Every earlier stage or checkpoint that the stage takes from.

    Raises:
        CheckpointError: it is not there or not finished.
    """
    return {
        name: open_source(name, source_folder(run_dir, name)) for name in needed_sources(stage.init)
    }


def source_folder(run_dir: Path, name: str) -> Path:
    """Folder of `checkpoint:PATH` or of an earlier stage of this run."""
    if name.startswith("checkpoint:"):
        return Path(name.removeprefix("checkpoint:")).expanduser()
    return run_dir / "checkpoints" / name / "final"


def initial_params(
    stage: Stage, sources: Mapping[str, Source], mesh: Mesh, seed: int, only: set[str] | None = None
) -> Flat:
    """All parameters (or those in `only`) at the start of the stage, on the mesh, in the dtype and
    sharding of the table."""
    wanted = [path for path in stage.infos if only is None or path in only]
    takes = {path: origin_of(path, stage.config.init) for path in wanted}
    fresh = [path for path, take in takes.items() if take.source == "fresh"]
    taken = {path: take for path, take in takes.items() if path not in fresh}
    params = _fresh(stage, fresh, mesh, seed) if fresh else {}
    return params | read_params(stage, taken, sources)


def read_params(stage: Stage, takes: Mapping[str, Take], sources: Mapping[str, Source]) -> Flat:
    """The parameters of `takes` as they lie in the sources, on the mesh as the table says.

    Raises:
        ParamError: a source lacks a parameter or holds another shape.
        CheckpointError: a source is damaged.
    """
    moe_layers = stage.model_config.decoder.moe_layers()
    # Everything is found before anything is read, and nothing is read that is damaged.
    starts = {
        path: start_of(path, stage.infos[path].shape, take, sources, moe_layers)
        for path, take in takes.items()
    }
    for name in needed_sources(list(takes.values())):
        sources[name].check()
    return {
        path: read_start(start, stage.infos[path].dtype, stage.shardings[path])
        for path, start in starts.items()
    }


def read_start(start: Start, dtype: str, sharding: NamedSharding) -> jax.Array:
    """A parameter read onto the mesh: a process reads what its own devices hold, each part once,
    and keeps one part at a time in its memory."""
    parts: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(start.shape).items():
        key = tuple(at.indices(n)[:2] for at, n in zip(index, start.shape, strict=True))
        parts.setdefault(key, []).append(device)
    arrays = []
    for key, devices in parts.items():
        value = start.read(tuple(slice(*ends) for ends in key), jnp.dtype(dtype))
        # Waiting for the copy, so that no two parts are in memory.
        arrays += jax.block_until_ready([jax.device_put(value, device) for device in devices])
    return jax.make_array_from_single_device_arrays(start.shape, sharding, arrays)


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array on the mesh; every process must hold the same value."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _fresh(stage: Stage, paths: list[str], mesh: Mesh, seed: int) -> Flat:
    shards = data_shards(mesh)
    batch = full_batch(stage.model_config, shards)

    def init(key: jax.Array) -> Flat:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), batch)
        keys = dict(zip(("params", "dropout", "router"), jax.random.split(key, 3), strict=True))
        flat = flatten(nn.meta.unbox(stage.model.init(keys, zeros)["params"]))
        # Only what is asked for is computed: the rest of the program is dead code.
        return {path: flat[path].astype(stage.infos[path].dtype) for path in paths}

    shardings = {path: stage.shardings[path] for path in paths}
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


# --------------------------------------------------------------------------------- results


def results(stage: Stage, params: Flat) -> tuple[Flat, list[str]]:
    """(parameters that the stage leaves behind, names of what was trained).

    `merge_lora` adds the adapters to their kernels; `leaves: trained` keeps only what changed.
    """
    left, changed = left_behind(stage.config, stage.infos)
    if stage.config.merge_lora:
        params = _merged(stage, params)
    return {path: leaf for path, leaf in params.items() if path in left}, sorted(changed)


def left_behind(stage: StageConfig, infos: Mapping[str, ParamInfo]) -> tuple[set[str], set[str]]:
    """(paths that the stage leaves behind, those of them that it has changed)."""
    left, changed = set(infos), {path for path, info in infos.items() if info.trained}
    if stage.merge_lora:
        changed |= {path.rsplit("/", 1)[0] + "/kernel" for path in changed if lora.is_adapter(path)}
        left = {path for path in left if not lora.is_adapter(path)}
    if stage.leaves == "trained":
        left &= changed
    return left, changed & left


def _merged(stage: Stage, params: Flat) -> Flat:
    """`lora.merge` where the parameters lie, kernel by kernel: no host need hold them all."""
    merged = {path: leaf for path, leaf in params.items() if not lora.is_adapter(path)}
    with jax.default_matmul_precision("highest"):
        for module in lora.modules(params):
            kernel = f"{module}/kernel"
            own = {path: params[path] for path in (kernel, f"{module}/lora_a", f"{module}/lora_b")}
            merge = partial(lora.merge, rules=stage.model_config.lora)
            merged |= jax.jit(merge, out_shardings={kernel: stage.shardings[kernel]})(own)
    return merged
