"""The programs of a stage, compiled ahead of the first step, for the devices here or for others."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from unimoe_jax.config import RunConfig
from unimoe_jax.data.batch import Batch
from unimoe_jax.setup_data import pool_groups
from unimoe_jax.sharding import batch_sharding, data_shards, replicated
from unimoe_jax.stage import Stage, structs
from unimoe_jax.train_step import make_score_step, make_train_step


def lower_step(run: RunConfig, stage: Stage, mesh: Mesh, spec: Batch) -> jax.stages.Lowered:
    """The train step for batches of `spec` (ArraySpecs); the state is donated."""
    config = stage.config
    groups = pool_groups(run, config, data_shards(mesh))
    step = make_train_step(
        stage.model, stage.optimizer, stage.schedule, config.aux, config.optim.accumulate, groups
    )
    shardings = (stage.state_shardings(mesh), replicated(mesh))
    jitted = jax.jit(step, donate_argnums=(0,), out_shardings=shardings)
    with jax.set_mesh(mesh):  # `use_mesh` may hold one without devices
        return jitted.lower(
            stage.state_template(mesh), stage.frozen_template(), batch_structs(mesh, spec)
        )


def lower_score(stage: Stage, mesh: Mesh, spec: Batch) -> jax.stages.Lowered:
    """The scoring step for batches of `spec`."""
    score = jax.jit(make_score_step(stage.scorer), out_shardings=replicated(mesh))
    params = {
        path: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=stage.shardings[path])
        for path, info in stage.infos.items()
    }
    with jax.set_mesh(mesh):
        return score.lower(params, batch_structs(mesh, spec))


def batch_structs(mesh: Mesh, spec: Batch) -> Any:
    """Shape structs of a batch, cut over the data shards."""
    return structs(spec, lambda rank: batch_sharding(mesh, rank))
