"""A stage made ready: its models, parameter table, shardings and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from unimoe_jax.config.stage_settings import StageSettings
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


def parameter_table(settings: StageSettings) -> dict[str, ParamInfo]:
    """Every parameter of the stage's model and what happens to it; computes nothing.

    Raises:
        ParamError: a parameter that no rule covers, or a rule that covers none.
        ShardingError: the experts do not divide over the expert axis of the current mesh.
    """
    for module, moe in settings.model.experts().items():
        check_divides(f"{moe_key(module)}.num_experts", moe.num_experts, "expert")
    model = UniMoE(settings.model, LayerOptions(lora=settings.model.lora))
    # shard() checks divisibility while tracing, so even this batch, of which only the shapes are
    # used, must divide by the number of data shards.
    mesh = current_mesh()
    batch = full_batch(settings.model, data_shards(mesh) if mesh else 1)
    shapes = declared(model, batch)
    try:
        return parameter_infos(shapes, settings.config.train, settings.precision)
    except ParamError as error:
        raise ParamError(f"stages.{settings.name}.{error}") from None


def moe_key(module: str) -> str:
    """The setting that gives `module` its experts."""
    return f"model.{'decoder' if module == 'decoder' else f'vision.{module}'}.moe"


@dataclass(frozen=True)
class Stage:
    """Everything that training and scoring a stage need.

    settings: the stage with all that it takes from its run.
    model, scorer: the module that trains (with dropout and sampled experts), and the module that
        scores as generation would answer.
    infos, shardings: by parameter path, from `parameter_table` and the mesh.
    schedule: step -> learning rate, without the multipliers of the rules.
    """

    settings: StageSettings
    model: UniMoE
    scorer: UniMoE
    infos: Mapping[str, ParamInfo]
    shardings: Mapping[str, NamedSharding]
    optimizer: optax.GradientTransformation
    schedule: Schedule
    steps: int

    def state_shardings(self, mesh: Mesh) -> TrainState:
        """Shardings of a TrainState: an optimizer moment is sharded like its parameter."""
        trained, _ = split(self.shardings, self.infos)
        shapes = jax.eval_shape(self.optimizer.init, self._trained_structs())
        everywhere = replicated(mesh)

        def moment_sharding(path, leaf) -> NamedSharding:
            # optax keeps moments in dictionaries with the parameters' paths as keys; counters have
            # no such key and are replicated.
            del leaf
            keys = [getattr(part, "key", None) for part in path]
            return next((trained[key] for key in keys if key in trained), everywhere)

        return TrainState(
            step=everywhere,
            trained=trained,
            optimizer=jax.tree_util.tree_map_with_path(moment_sharding, shapes),
            seed=everywhere,
            bad_steps=everywhere,
        )

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


def build_stage(settings: StageSettings, mesh: Mesh, steps: int) -> Stage:
    """Make a stage of `steps` steps ready on `mesh`. Must run inside `use_mesh`.

    Raises:
        ParamError, ShardingError: rules or shapes that do not fit; the parameter is named. Or an
            exchange of tokens that the devices do not have.
    """
    model = settings.model
    for module, moe in model.experts().items():
        if moe.exchange == "ragged" and mesh_axes("expert") and current_platform() == "cpu":
            raise ShardingError(
                f"{moe_key(module)}.exchange = ragged: CPUs have no such collective; allowed "
                "there: auto | gather | all_to_all"
            )
    dtype = jnp.dtype(settings.precision.compute)
    infos = parameter_table(settings)
    optim = settings.config.optim
    schedule = learning_rate(optim, steps)
    return Stage(
        settings=settings,
        model=UniMoE(model, LayerOptions(dtype=dtype, lora=model.lora, train=True)),
        scorer=UniMoE(model.answering, LayerOptions(dtype=dtype, lora=model.lora)),
        infos=infos,
        shardings={
            path: param_sharding(mesh, path, info.shape, info.axes) for path, info in infos.items()
        },
        optimizer=make_optimizer(optim, schedule, infos),
        schedule=schedule,
        steps=steps,
    )
