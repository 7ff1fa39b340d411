"""The loop of one stage: restore, compile, step, log, save, score, leave the result."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.checkpoints.steps import StepCheckpoints
from unimoe_jax.config import StageConfig
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.evaluate.controls import chance_levels
from unimoe_jax.evaluate.exact_match import exact_match
from unimoe_jax.metrics.progress import Progress
from unimoe_jax.metrics.records import MetricsWriter
from unimoe_jax.parallel.distributed import all_texts, require_same, writer_first
from unimoe_jax.parallel.placement import to_devices
from unimoe_jax.parallel.sharding import data_shards, own_data_shards, use_mesh
from unimoe_jax.params.paths import Flat
from unimoe_jax.params.table import describe, split
from unimoe_jax.runtime.files import write_text_atomic
from unimoe_jax.stages.data import heldout_pipeline, pool_groups, stage_pipeline, stage_steps
from unimoe_jax.stages.initial_params import initial_params, open_sources
from unimoe_jax.stages.programs import lower_score, lower_step
from unimoe_jax.stages.stage import Stage, build_stage
from unimoe_jax.stages.train_step import TrainState, init_state
from unimoe_jax.stages.upcycle_check import check_upcycled
from unimoe_jax.train.context import RunContext
from unimoe_jax.train.finish import leave_results
from unimoe_jax.train.stage_log import StageLog
from unimoe_jax.train.summary import StageSummary


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and where it can be resumed."""


def train_stage(runtime: RunContext, config: StageConfig) -> StageSummary | None:
    """Run (or resume) one stage to its end. None: a stop signal came first; the state is saved.

    Raises:
        TrainingStopped: too many non-finite steps in a row.
        CheckpointError: saved steps that do not fit what the stage trains, or for how long.
    """
    run, mesh, started = runtime.run, runtime.mesh, time.monotonic()
    pipeline, stage = _prepare(runtime, config)
    summary = StageSummary(stage.steps)
    folder = runtime.folder / "checkpoints" / config.name
    progress = Progress(
        config.name, stage.steps, enabled=runtime.is_writer, every_steps=10 * run.log.every
    )
    with (
        StepCheckpoints(folder / "steps", run.checkpoint.keep) as checkpoints,
        contextlib.closing(progress),
    ):
        state, frozen, done, position = _start(runtime, stage, pipeline, checkpoints)
        step_fns, score_fns, heldout = _compile(runtime, stage, pipeline, progress)
        summary.resume(position)
        started -= summary.seconds  # as if the earlier sittings had ended just now

        def score() -> dict[str, float] | None:
            params = {**frozen, **state.trained}
            return exact_match(params, heldout, score_fns, mesh, runtime.stop.agreed)

        if config.evaluate and not done:  # later there is nothing to compare with
            summary.heldout_before = score()
            if summary.heldout_before is None:
                return None
        log = _open_log(runtime, stage, pipeline, progress, summary, done)
        log.total_tokens, log.total_seconds = position.get("speed", (0.0, 0.0))

        def save(step: int, state: TrainState) -> None:
            summary.seconds = time.monotonic() - started
            speed = log.total_tokens, log.total_seconds
            told = {"samples": _samples(pipeline, position), "speed": speed}
            checkpoints.save(step, state, summary.position(pipeline.state(step)) | told)

        with log.writer:
            state, finished = _steps(
                runtime, stage, pipeline, state, frozen, step_fns, done, log, save
            )
        if not finished:
            return None
        if config.evaluate:
            summary.heldout = score()
            if summary.heldout is None:  # scoring may outlast a scheduler's patience
                if done < stage.steps:
                    save(stage.steps, state)
                return None
            summary.chance = chance_levels(runtime.data, config.evaluate)
    params = {**frozen, **state.trained}
    summary.seconds = time.monotonic() - started
    _sum_up(summary, log, pipeline, position)
    leave_results(runtime, stage, params, folder / "final", summary)
    if pipeline.tally.counts:
        runtime.tell(pipeline.tally.table())
    return summary


def _sum_up(
    summary: StageSummary, log: StageLog, pipeline: Pipeline, position: dict[str, Any]
) -> None:
    """Speed and samples of all sittings of a stage that has ended."""
    summary.tokens_per_s = log.total_tokens / log.total_seconds if log.total_seconds else None
    for text in _samples(pipeline, position):
        pipeline.tally.join(text)
    summary.samples = pipeline.tally.as_json()


def _samples(pipeline: Pipeline, position: dict[str, Any]) -> list[str]:
    """What the tallies of all processes, each of which reads its own samples, have to tell: of the
    sittings that `position` was saved in, then of this one."""
    return [*position.get("samples", []), *all_texts("samples", pipeline.tally.as_text())]


def _open_log(
    runtime: RunContext, stage: Stage, pipeline: Pipeline, progress, summary, done
) -> StageLog:
    run, name, shards = runtime.run, stage.config.name, data_shards(runtime.mesh)
    writer = MetricsWriter(
        *(runtime.folder, name, stage.steps),
        resumed_step=done,
        tensorboard=run.log.tensorboard,
        enabled=runtime.is_writer,
    )
    return StageLog(
        *(writer, progress, summary, run.log.every, stage.steps),
        imbalance=lambda step: pipeline.imbalance(step, shards) if shards > 1 else {},
    )


def _prepare(runtime: RunContext, config: StageConfig) -> tuple[Pipeline, Stage]:
    """The stage's data, and its model, tables and optimizer; writes the parameter table."""
    run, mesh = runtime.run, runtime.mesh
    groups = pool_groups(run, config, data_shards(mesh))

    def build() -> Pipeline:
        return stage_pipeline(run, config, runtime.data, runtime.tokenizer, groups)

    pipeline = writer_first("indices", build)
    require_same(f"data of stage {config.name}", json.dumps(pipeline.state(0), sort_keys=True))
    stage = build_stage(run, config, mesh, stage_steps(config, pipeline))
    if runtime.is_writer:
        table = runtime.folder / "params" / f"{config.name}.txt"
        table.parent.mkdir(exist_ok=True)
        write_text_atomic(table, describe(stage.infos, stage.shardings))
    return pipeline, stage


def _start(runtime: RunContext, stage: Stage, pipeline: Pipeline, checkpoints: StepCheckpoints):
    """(state, frozen, steps done, saved position): from the newest checkpoint or the beginning."""
    run, mesh = runtime.run, runtime.mesh
    sources = open_sources(runtime.folder, stage.config)
    seed = run.seed + 1 + [s.name for s in run.stages].index(stage.config.name)
    restored = checkpoints.restore_latest(stage.state_template(mesh), tell=runtime.tell)
    if restored is None:
        params = initial_params(stage, sources, mesh, seed)
        comparison = check_upcycled(stage, params, sources, mesh)
        if comparison:
            runtime.tell(f"{stage.config.name}: {comparison}: rounding")
        trained, frozen = split(params, stage.infos)
        init = jax.jit(
            lambda trained: init_state(trained, stage.optimizer, seed),
            out_shardings=stage.state_shardings(mesh),
        )
        return init(trained), frozen, 0, {"upcycled": comparison and comparison.difference}
    step, state, position = restored
    if step > stage.steps:
        raise CheckpointError(
            f"stage {stage.config.name}: {step} steps are done, its length now is {stage.steps}; "
            f"set it to {step} or more, or remove {checkpoints.folder} to start the stage again"
        )
    try:
        pipeline.check_state(position["data"])
    except ValueError as error:
        raise CheckpointError(f"{checkpoints.folder / str(step)}: {error}") from error
    _, frozen_infos = split(stage.infos, stage.infos)
    # With the seed that it began with: the stages before this one may be others by now.
    begun = int(state.seed)
    frozen = initial_params(stage, sources, mesh, begun, only=set(frozen_infos))
    return state, frozen, step, position


def _compile(runtime: RunContext, stage: Stage, pipeline: Pipeline, progress: Progress):
    """Compile everything the stage will run, side by side: afterwards nothing can recompile."""
    run, mesh, config = runtime.run, runtime.mesh, stage.config

    def build_heldout() -> Pipeline:
        groups = pool_groups(run, config, data_shards(mesh))
        return heldout_pipeline(run, config, runtime.data, runtime.tokenizer, groups)

    heldout = writer_first("held-out indices", build_heldout) if config.evaluate else None
    jobs: dict[Any, Callable[[], Any]] = {
        ("step", name): lambda name=name: lower_step(run, stage, mesh, pipeline.spec(name))
        for name in pipeline.signatures
    } | {
        ("score", name): lambda name=name: lower_score(stage, mesh, heldout.spec(name))
        for name in (heldout.signatures if heldout else ())
    }

    def compiled(job: Callable[[], Any]) -> Any:
        with use_mesh(mesh, run.mesh.rules):  # its thread knows neither mesh nor table
            return job().compile()

    progress.announce(f"compiling {len(jobs)} programs,")
    pool = ThreadPoolExecutor(max_workers=4)
    try:
        done = dict(zip(jobs, pool.map(compiled, jobs.values()), strict=True))
    finally:  # who interrupts this does not wait for minutes of it
        pool.shutdown(wait=False, cancel_futures=True)
    steps = {key[1]: fn for key, fn in done.items() if key[0] == "step"}
    scores = {key[1]: fn for key, fn in done.items() if key[0] == "score"}
    return steps, scores, heldout


def _steps(
    runtime, stage: Stage, pipeline, state, frozen: Flat, step_fns, done, log: StageLog, save
):
    """Steps `done`+1 … stage.steps. Returns (state, whether the end was reached)."""
    every, limit = runtime.run.checkpoint.every, stage.config.optim.max_bad_steps
    batches = pipeline.batches(
        start_step=done,
        parts=own_data_shards(runtime.mesh),
        of=data_shards(runtime.mesh),
        stop_step=stage.steps,
    )
    pending, saved, log.since = None, done, time.monotonic()

    def account() -> None:
        nonlocal pending
        if pending is not None:
            log.add(*pending)
            _check_finite(pending, limit, saved)
            pending = None

    try:
        if runtime.stop.agreed():  # while compiling or scoring: nothing is lost
            return state, False
        while done < stage.steps:
            before = time.monotonic()
            index, signature, batch = next(batches)
            log.waited += time.monotonic() - before
            batch = to_devices(batch, runtime.mesh)
            state, metrics = step_fns[signature](state, frozen, batch)
            done = index + 1
            # The metrics of the step before: the devices are already busy with this one.
            account()
            pending = (done, signature, metrics)
            stopping = runtime.stop.agreed() and done < stage.steps
            if stopping or (done % every == 0 and done < stage.steps):
                account()  # what is saved tells of all its steps,
                log.flush()  # and who goes on from it could not record them
                save(done, state)
                saved = done
            if stopping:
                log.progress.close()
                return state, False
    finally:
        batches.close()
    account()
    return state, True


def _check_finite(pending, limit: int, saved: int) -> None:
    step, signature, metrics = pending
    if int(metrics["bad_steps"]) >= limit:
        raise TrainingStopped(
            f"step {step} ({'+'.join(sorted(signature)) or 'text'}): loss or gradient was not "
            f"finite in {limit} steps in a row; nothing of them was applied. The last checkpoint "
            f"is step {saved}. Lower optim.learning_rate or set optim.clip_norm."
        )
