"""A stage made ready: its model, parameters on the mesh, optimizer, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from unimoe_jax.config import ModelConfig, RunConfig, StageConfig
from unimoe_jax.models.declare import full_batch
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.parallel.sharding import (
    ShardingError,
    check_divides,
    current_mesh,
    current_platform,
    data_shards,
    mesh_axes,
    param_sharding,
    replicated,
)
from unimoe_jax.params.paths import Flat, ParamError
from unimoe_jax.params.table import ParamInfo, declared, parameter_infos, split
from unimoe_jax.stages.optim import Schedule, learning_rate, make_optimizer
from unimoe_jax.stages.train_step import TrainState, init_state


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
        return parameter_infos(shapes, stage.train, run.precision)
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


# --------------------------------------------------------------------------------- results
