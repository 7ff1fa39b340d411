"""The parameters of a stage at its start, read or drawn onto the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from unimoe_jax.checkpoints.final import open_source
from unimoe_jax.checkpoints.origins import needed_sources, origin_of, start_of
from unimoe_jax.checkpoints.sources import ParamSource, Start
from unimoe_jax.config import StageConfig, Take
from unimoe_jax.models.declare import full_batch
from unimoe_jax.parallel.sharding import data_shards
from unimoe_jax.params.paths import Flat, flatten
from unimoe_jax.stages.stage import Stage


def open_sources(run_dir: Path, stage: StageConfig) -> dict[str, ParamSource]:
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
    stage: Stage,
    sources: Mapping[str, ParamSource],
    mesh: Mesh,
    seed: int,
    only: set[str] | None = None,
) -> Flat:
    """All parameters (or those in `only`) at the start of the stage, on the mesh, in the dtype and
    sharding of the table."""
    wanted = [path for path in stage.infos if only is None or path in only]
    takes = {path: origin_of(path, stage.config.init) for path in wanted}
    fresh = [path for path, take in takes.items() if take.source == "fresh"]
    taken = {path: take for path, take in takes.items() if path not in fresh}
    params = _fresh(stage, fresh, mesh, seed) if fresh else {}
    return params | read_params(stage, taken, sources)


def read_params(
    stage: Stage, takes: Mapping[str, Take], sources: Mapping[str, ParamSource]
) -> Flat:
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
