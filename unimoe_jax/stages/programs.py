"""The train step and the scoring step of a stage, lowered for compilation.

`train` compiles them before the first step; `compile` does so for devices that are not here.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from unimoe_jax.data.batch import Batch
from unimoe_jax.parallel.placement import batch_structs
from unimoe_jax.parallel.sharding import data_shards, replicated
from unimoe_jax.stages.score_step import make_score_step
from unimoe_jax.stages.stage import Stage
from unimoe_jax.stages.train_step import make_train_step


def lower_step(stage: Stage, mesh: Mesh, spec: Batch) -> jax.stages.Lowered:
    """The train step for batches of `spec` (a Batch of ArraySpecs); the state is donated."""
    config = stage.settings.config
    step = make_train_step(
        stage.model,
        stage.optimizer,
        stage.schedule,
        aux_config=config.aux,
        accumulate=config.optim.accumulate,
        groups=stage.settings.pool_groups(data_shards(mesh)),
    )
    shardings = (stage.state_shardings(mesh), replicated(mesh))
    jitted = jax.jit(step, donate_argnums=(0,), out_shardings=shardings)
    with jax.set_mesh(mesh):  # `use_mesh` may hold an abstract mesh, which has no devices.
        return jitted.lower(
            stage.state_template(mesh), stage.frozen_template(), batch_structs(mesh, spec)
        )


def lower_score(stage: Stage, mesh: Mesh, spec: Batch) -> jax.stages.Lowered:
    """The scoring step for batches of `spec` (a Batch of ArraySpecs)."""
    score = jax.jit(make_score_step(stage.scorer), out_shardings=replicated(mesh))
    params = {
        path: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=stage.shardings[path])
        for path, info in stage.infos.items()
    }
    with jax.set_mesh(mesh):
        return score.lower(params, batch_structs(mesh, spec))
