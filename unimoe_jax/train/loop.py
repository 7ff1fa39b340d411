"""The loop of one stage: restore, compile, step, log, save, score, leave the result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import Any

import numpy as np

from unimoe_jax.checkpoints.steps import StepCheckpoints
from unimoe_jax.config.stage_settings import StageSettings
from unimoe_jax.data.batch import Signature
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.evaluate.controls import chance_levels
from unimoe_jax.evaluate.exact_match import exact_match
from unimoe_jax.metrics.progress import Progress
from unimoe_jax.metrics.records import MetricsWriter
from unimoe_jax.parallel.distributed import all_texts
from unimoe_jax.parallel.placement import to_devices
from unimoe_jax.parallel.sharding import data_shards, own_data_shards
from unimoe_jax.params.paths import Flat
from unimoe_jax.stages.stage import Stage
from unimoe_jax.train.context import RunContext
from unimoe_jax.train.finish import leave_results
from unimoe_jax.train.stage_log import StageLog
from unimoe_jax.train.stage_programs import StagePrograms, compile_stage
from unimoe_jax.train.stage_start import StageStart, prepare_stage, start_stage
from unimoe_jax.train.summary import StageSummary


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and where it can be resumed."""


def train_stage(context: RunContext, settings: StageSettings) -> StageSummary | None:
    """Run (or resume) one stage to its end. None: a stop signal came first; the state is saved.

    Raises:
        TrainingStopped: too many non-finite steps in a row.
        CheckpointError: saved steps that do not fit the trained parameters or the stage's length.
    """
    started = time.monotonic()
    pipeline, stage = prepare_stage(context, settings)
    layout = context.layout.stage(settings.name)
    progress = Progress(
        settings.name,
        stage.steps,
        enabled=context.is_writer,
        every_steps=10 * context.run.log.every,
    )
    with (
        StepCheckpoints(layout.steps, context.run.checkpoint.keep) as checkpoints,
        contextlib.closing(progress),
    ):
        start = start_stage(context, stage, pipeline, checkpoints)
        programs = compile_stage(context, stage, pipeline, progress)
        run = StageRun(context, stage, pipeline, programs, checkpoints, start, progress, started)
        if not run.run():
            return None
    run.sum_up()
    leave_results(context, stage, run.params, run.summary)
    if pipeline.tally.counts:
        context.announce(pipeline.tally.report())
    return run.summary


class StageRun:
    """One stage while it trains: its state, its log and what is saved.

    started: `time.monotonic()` when work on the stage began, for the time that it takes.
    """

    def __init__(
        self,
        context: RunContext,
        stage: Stage,
        pipeline: Pipeline,
        programs: StagePrograms,
        checkpoints: StepCheckpoints,
        start: StageStart,
        progress: Progress,
        started: float,
    ):
        self.context, self.stage, self.pipeline = context, stage, pipeline
        self.programs, self.checkpoints, self.progress = programs, checkpoints, progress
        self.state, self.frozen, self.done = start.state, start.frozen, start.step
        self.start = start
        self.summary = StageSummary(stage.steps)
        self.summary.restore_fields(start.position)
        # Count the time of earlier runs of this stage as well.
        self.started = started - self.summary.seconds
        self.saved = start.step
        # (step, signature, metrics) of a step whose metrics have not been read yet.
        self.pending: tuple[int, Signature, dict[str, Any]] | None = None

    @property
    def params(self) -> Flat:
        """All parameters, frozen and trained."""
        return {**self.frozen, **self.state.trained}

    def run(self) -> bool:
        """Score, train, score again. False: a stop signal came first; the state is saved."""
        evaluate = self.stage.settings.config.evaluate
        # Only a stage that begins is scored first: a resumed one has trained already, so its score
        # would not be that of the start.
        if evaluate and self.start.step == 0:
            self.summary.heldout_before = self.score()
            if self.summary.heldout_before is None:
                return False
        self.log: StageLog = self.open_log()
        with self.log.writer:
            if not self.train():
                return False
        if evaluate:
            self.summary.heldout = self.score()
            if self.summary.heldout is None:
                # Scoring may outlast the patience of a scheduler, so the steps are saved.
                if self.start.step < self.stage.steps:
                    self.save()
                return False
            self.summary.chance = chance_levels(self.context.data, evaluate)
        return True

    def open_log(self) -> StageLog:
        """The log of this stage, with the totals of earlier runs of it."""
        context, stage = self.context, self.stage
        shards = data_shards(context.mesh)
        writer = MetricsWriter(
            context.layout.folder,
            stage.settings.name,
            stage.steps,
            resumed_step=self.done,
            tensorboard=context.run.log.tensorboard,
            enabled=context.is_writer,
        )
        total_tokens, total_seconds = self.start.position.get("speed", (0.0, 0.0))
        return StageLog(
            writer=writer,
            progress=self.progress,
            summary=self.summary,
            every=context.run.log.every,
            steps=stage.steps,
            imbalance=lambda step: self.pipeline.imbalance(step, shards) if shards > 1 else {},
            total_tokens=total_tokens,
            total_seconds=total_seconds,
        )

    def train(self) -> bool:
        """Run all steps that are left. False: a stop signal came first; the state is saved."""
        every, mesh = self.context.run.checkpoint.every, self.context.mesh
        batches = self.pipeline.batches(
            start_step=self.done,
            shards=own_data_shards(mesh),
            num_shards=data_shards(mesh),
            stop_step=self.stage.steps,
        )
        self.log.since = time.monotonic()
        try:
            # A signal that came while programs were compiled or samples scored: no step is lost.
            if self.context.stop.agreed():
                return False
            while self.done < self.stage.steps:
                self.step(batches)
                unfinished = self.done < self.stage.steps
                stopping = self.context.stop.agreed() and unfinished
                if stopping or (self.done % every == 0 and unfinished):
                    self.save()
                if stopping:
                    self.log.progress.close()
                    return False
        finally:
            batches.close()
        self._account()
        return True

    def step(self, batches: Generator[tuple[int, Signature, Any], None, None]) -> None:
        """Take the next batch, start its step on the devices, and read the step before it."""
        waiting_since = time.monotonic()
        index, signature, batch = next(batches)
        self.log.waited += time.monotonic() - waiting_since
        batch = to_devices(batch, self.context.mesh)
        self.state, metrics = self.programs.step[signature](self.state, self.frozen, batch)
        self.done = index + 1
        # Reading metrics waits for their step. The devices are busy with the new step already, so
        # reading those of the step before leaves no gap.
        self._account()
        self.pending = (self.done, signature, metrics)

    def save(self) -> None:
        """Save the state after the last step, with all that a resumed run needs beside it."""
        # Log the pending step before saving: a run resumed from this checkpoint could not do so.
        self._account()
        self.log.flush()
        self.summary.seconds = time.monotonic() - self.started
        position = self.summary.checkpoint_fields(self.pipeline.state(self.done))
        position |= {
            "samples": self._sample_counts(),
            "speed": (self.log.total_tokens, self.log.total_seconds),
        }
        self.checkpoints.save(self.done, self.state, position)
        self.saved = self.done

    def score(self) -> dict[str, float] | None:
        """Exact match per held-out source; None if a stop signal came first."""
        assert self.programs.heldout is not None
        return exact_match(
            self.params,
            self.programs.heldout,
            self.programs.score,
            self.context.mesh,
            self.context.stop.agreed,
        )

    def sum_up(self) -> None:
        """Complete the summary with time, speed and samples of all runs of this stage."""
        summary, log, tally = self.summary, self.log, self.pipeline.tally
        summary.seconds = time.monotonic() - self.started
        summary.tokens_per_s = log.total_tokens / log.total_seconds if log.total_seconds else None
        for counts in self._sample_counts():
            tally.join(counts)
        summary.samples = tally.as_json()

    def _sample_counts(self) -> list[str]:
        """Tallies as text: those of earlier runs, which the checkpoint holds, then those of all
        processes of this run, each of which reads its own samples."""
        earlier = self.start.position.get("samples", [])
        return [*earlier, *all_texts("samples", self.pipeline.tally.as_text())]

    def _account(self) -> None:
        """Log the step whose metrics have not been read yet, if there is one.

        Raises:
            TrainingStopped: too many steps in a row were not finite.
        """
        if self.pending is None:
            return
        step, signature, metrics = self.pending
        self.pending = None
        self.log.add(step, signature, metrics)
        limit = self.stage.settings.config.optim.max_bad_steps
        if int(np.asarray(metrics["bad_steps"])) >= limit:
            raise TrainingStopped(
                f"step {step} ({'+'.join(sorted(signature)) or 'text'}): loss or gradient was not "
                f"finite in {limit} steps in a row; none of them was applied. The last checkpoint "
                f"is step {self.saved}. Lower optim.learning_rate or set optim.clip_norm."
            )
