"""Where a stage begins: its data and tables, then its parameters or its newest checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jax

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.checkpoints.steps import StepCheckpoints
from unimoe_jax.config.stage_settings import StageSettings
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.parallel.distributed import require_same, writer_first
from unimoe_jax.parallel.sharding import data_shards
from unimoe_jax.params.paths import Flat
from unimoe_jax.params.table import describe, split
from unimoe_jax.runtime.files import write_text_atomic
from unimoe_jax.stages.data import stage_pipeline, stage_steps
from unimoe_jax.stages.initial_params import initial_params, open_sources
from unimoe_jax.stages.stage import Stage, build_stage
from unimoe_jax.stages.train_step import TrainState, init_state
from unimoe_jax.stages.upcycle_check import check_upcycled
from unimoe_jax.train.context import RunContext


@dataclass(frozen=True)
class StageStart:
    """The state that a stage goes on from.

    step: how many steps are done.
    position: what the checkpoint holds beside the state; at step 0 only what the upcycling check
        found.
    """

    state: TrainState
    frozen: Flat
    step: int
    position: dict[str, Any]


def prepare_stage(context: RunContext, settings: StageSettings) -> tuple[Pipeline, Stage]:
    """The stage's training data, and its models, tables and optimizer.

    Process 0 writes the parameter table into the run directory.
    """
    mesh = context.mesh
    groups = settings.pool_groups(data_shards(mesh))

    def build() -> Pipeline:
        return stage_pipeline(settings, context.data, context.tokenizer, groups)

    # Building the pipeline measures all records once and caches their sizes; process 0 does that
    # first, and the others find the cache.
    pipeline = writer_first("indices", build)
    require_same(f"data of stage {settings.name}", json.dumps(pipeline.state(0), sort_keys=True))
    stage = build_stage(settings, mesh, stage_steps(settings, pipeline))
    if context.is_writer:
        table = context.layout.parameter_table(settings.name)
        table.parent.mkdir(exist_ok=True)
        write_text_atomic(table, describe(stage.infos, stage.shardings))
    return pipeline, stage


def start_stage(
    context: RunContext, stage: Stage, pipeline: Pipeline, checkpoints: StepCheckpoints
) -> StageStart:
    """Restore the newest sound checkpoint, or make the parameters that the stage begins with.

    Raises:
        CheckpointError: a checkpoint that does not fit the settings or the data, or a source that
            is missing or damaged.
    """
    restored = checkpoints.restore_latest(
        stage.state_template(context.mesh), announce=context.announce
    )
    if restored is None:
        return _begin(context, stage)
    step, state, position = restored
    if step > stage.steps:
        raise CheckpointError(
            f"stage {stage.settings.name}: {step} steps are done, its length now is {stage.steps}; "
            f"set it to {step} or more, or remove {checkpoints.folder} to start the stage again"
        )
    try:
        pipeline.check_state(position["data"])
    except ValueError as error:
        raise CheckpointError(f"{checkpoints.folder / str(step)}: {error}") from error
    # A checkpoint does not hold the frozen parameters, so they are made again. Use the seed from
    # the checkpoint: the seed follows from the stage's place in the list, which may have changed.
    _, frozen_infos = split(stage.infos, stage.infos)
    sources = open_sources(context.layout, stage.settings.config)
    seed = int(state.seed)
    frozen = initial_params(stage, sources, context.mesh, seed, only=set(frozen_infos))
    return StageStart(state, frozen, step, position)


def _begin(context: RunContext, stage: Stage) -> StageStart:
    """The parameters at step 0; an upcycled model is compared with the dense one first."""
    mesh, seed = context.mesh, stage.settings.param_seed
    sources = open_sources(context.layout, stage.settings.config)
    params = initial_params(stage, sources, mesh, seed)
    comparison = check_upcycled(stage, params, sources, mesh)
    if comparison:
        context.announce(f"{stage.settings.name}: {comparison}: rounding")
    trained, frozen = split(params, stage.infos)
    make_state = jax.jit(
        lambda trained: init_state(trained, stage.optimizer, seed),
        out_shardings=stage.state_shardings(mesh),
    )
    position = {"upcycled": comparison and comparison.difference}
    return StageStart(make_state(trained), frozen, 0, position)
