"""Compile everything that a stage will run before its first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from unimoe_jax.data.batch import Signature
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.metrics.progress import Progress
from unimoe_jax.parallel.distributed import writer_first
from unimoe_jax.parallel.sharding import data_shards, use_mesh
from unimoe_jax.stages.data import heldout_pipeline
from unimoe_jax.stages.programs import lower_score, lower_step
from unimoe_jax.stages.stage import Stage
from unimoe_jax.train.context import RunContext

Programs = Mapping[Signature, Any]
"""One compiled program for every combination of media that a batch may hold."""


@dataclass(frozen=True)
class StagePrograms:
    """Compiled train steps and scoring steps, and the held-out batches that are scored (None if the
    stage has no held-out sources)."""

    step: Programs
    score: Programs
    heldout: Pipeline | None


def compile_stage(
    context: RunContext, stage: Stage, pipeline: Pipeline, progress: Progress
) -> StagePrograms:
    """Compile all programs of a stage at the same time; afterwards nothing can be recompiled."""
    mesh = context.mesh
    heldout = None
    if stage.settings.config.evaluate:
        heldout = writer_first("held-out indices", lambda: _heldout(context, stage))

    jobs: dict[tuple[str, Signature], Callable[[], jax.stages.Lowered]] = {}
    for name in pipeline.signatures:
        jobs["step", name] = lambda name=name: lower_step(stage, mesh, pipeline.spec(name))
    if heldout:
        for name in heldout.signatures:
            spec = heldout.spec(name)
            jobs["score", name] = lambda spec=spec: lower_score(stage, mesh, spec)

    def compiled(job: Callable[[], jax.stages.Lowered]) -> Any:
        # The current mesh is thread-local, so each worker thread sets it again.
        with use_mesh(mesh, context.run.mesh.rules):
            return job().compile()

    progress.announce(f"compiling {len(jobs)} programs,")
    pool = ThreadPoolExecutor(max_workers=4)
    try:
        done = dict(zip(jobs, pool.map(compiled, jobs.values()), strict=True))
    finally:
        # On Ctrl-C, do not wait for compilations that are still running.
        pool.shutdown(wait=False, cancel_futures=True)
    return StagePrograms(
        step={name: program for (kind, name), program in done.items() if kind == "step"},
        score={name: program for (kind, name), program in done.items() if kind == "score"},
        heldout=heldout,
    )


def _heldout(context: RunContext, stage: Stage) -> Pipeline:
    groups = stage.settings.pool_groups(data_shards(context.mesh))
    return heldout_pipeline(stage.settings, context.data, context.tokenizer, groups)
