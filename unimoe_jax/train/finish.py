"""What a finished stage and a finished run leave behind."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unimoe_jax.checkpoints.checksums import SUMS, CheckpointError
from unimoe_jax.checkpoints.final import save_final
from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.checkpoints.manifest import MANIFEST, read_manifest
from unimoe_jax.config import RunConfig
from unimoe_jax.evaluate.controls import chance_levels
from unimoe_jax.evaluate.exact_match import is_scorable
from unimoe_jax.metrics.records import read_metrics
from unimoe_jax.metrics.router_trends import as_json, router_trends
from unimoe_jax.metrics.series import by_stage
from unimoe_jax.params.paths import Flat
from unimoe_jax.report.console import print_result_block
from unimoe_jax.report.page import write_report
from unimoe_jax.runtime.files import write_json_atomic
from unimoe_jax.stages.final_params import results
from unimoe_jax.stages.initial_params import source_folder
from unimoe_jax.stages.stage import Stage
from unimoe_jax.train.context import RunContext
from unimoe_jax.train.summary import StageSummary, read_stage_summary


def leave_results(context: RunContext, stage: Stage, params: Flat, summary: StageSummary) -> None:
    """Write what the stage leaves behind, with a manifest of where it came from.

    The summary is written first: once the result exists, the stage counts as finished and is
    skipped, so a summary that a crash lost between the two could never be written again.
    """
    layout = context.layout.stage(stage.settings.name)
    if context.is_writer:
        write_json_atomic(layout.summary, asdict(summary))
    params, changed = results(stage, params)
    config = stage.settings.config
    manifest = {
        "run": context.run.name,
        "stage": config.name,
        "steps": stage.steps,
        "moe_layers": list(stage.settings.model.decoder.moe_layers()),
        "lora_merged": config.merge_lora,
        "parents": {
            name: str(source_folder(context.layout, name))
            for take in config.init
            for name in take.origins
            if name != "fresh"
        },
        "init": [take.model_dump(exclude_none=True) for take in config.init],
        "data": dict(config.mixture),
        "trained": changed,
        "shapes": {path: list(leaf.shape) for path, leaf in params.items()},
        "upcycled": summary.upcycled,
        "heldout": summary.heldout,
    }
    save_final(layout.final, params, manifest)


def finished_stages(config: RunConfig, layout: RunLayout) -> dict[str, int]:
    """Steps of every finished stage.

    Raises:
        CheckpointError, RunFolderError: a result or a summary is damaged.
    """
    steps = {stage.name: finished_steps(layout, stage.name) for stage in config.stages}
    finished = {name: count for name, count in steps.items() if count is not None}
    for name in finished:
        read_stage_summary(layout.stage(name))
    return finished


def finished_steps(layout: RunLayout, name: str) -> int | None:
    """How many steps a finished stage has trained; None if the stage has not finished.

    Raises:
        CheckpointError: a part of its result is missing or damaged.
    """
    final = layout.stage(name).final
    # `final` is renamed into place when it is complete, so if it exists the stage has finished.
    if not final.exists():
        return None
    try:
        return _steps_of_result(final)
    except CheckpointError as error:
        raise CheckpointError(
            f"stage {name} has finished, but its result is not whole: {error}; bring it back, or "
            f"remove {final} to train the stage again from its last checkpoint"
        ) from error


def _steps_of_result(final: Path) -> int:
    """How many steps the manifest counts. Raises CheckpointError if a sealed file is missing."""
    try:
        steps = int(read_manifest(final)["steps"])
        sealed = json.loads((final / SUMS).read_text())
        lost = next((file for file in sealed if not (final / file).is_file()), None)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{final}: {MANIFEST} or {SUMS} is missing or damaged") from error
    if lost:
        raise CheckpointError(f"{final / lost}: missing")
    return steps


def next_command(config: RunConfig, layout: RunLayout, finished: Collection[str]) -> str:
    """The command that a user would try now: the control of the evaluation if the stage that it
    scores has finished, otherwise a chat."""
    folder = shlex.quote(str(layout.folder))
    scored = [stage for stage in config.stages if stage.evaluate]
    if scored and scored[-1].name in finished and is_scorable(scored[-1]):
        return f"python -m unimoe_jax.evaluate {folder} --shuffle-media"
    return f"python -m unimoe_jax.generate --model {folder} --chat"


def finish(context: RunContext, seconds: float | None) -> None:
    """Write summary.json, plots and report, and print the result block.

    seconds: how long this command took. None if it has trained nothing; the time in an earlier
        summary.json is kept then.
    """
    config, layout = context.run, context.layout
    summaries = _finished_summaries(config, layout)
    if seconds is None:
        seconds = _earlier_seconds(layout)
    recorded = layout.metrics.exists()
    if not recorded:
        context.announce(f"{layout.metrics}: missing, so there is no report of the stages")
    records = by_stage(read_metrics(layout.folder)) if recorded else {}
    summary = {
        "name": config.name,
        "seconds": sum(stage["seconds"] for stage in summaries.values()),
        "wall_seconds": seconds,
        "stages": summaries,
        "stages_in_all": len(config.stages),
        "heldout": _last_scores(context, summaries),
        "routers": as_json(router_trends(records, config)),
        "run_dir": str(layout.folder),
        "next_command": next_command(config, layout, summaries),
    }
    write_json_atomic(layout.summary, summary)
    if config.log.plots and recorded:
        write_report(layout.folder)
    print_result_block(summary, layout.folder)


def _finished_summaries(config: RunConfig, layout: RunLayout) -> dict[str, dict[str, Any]]:
    """Summaries of the finished stages. A stage writes its summary before its result, so a summary
    without a result belongs to a stage that has not finished."""
    names = [s.name for s in config.stages if finished_steps(layout, s.name) is not None]
    found = {name: read_stage_summary(layout.stage(name)) for name in names}
    return {name: summary for name, summary in found.items() if summary is not None}


def _earlier_seconds(layout: RunLayout) -> float | None:
    """The time in summary.json, or None. A damaged file is written again in a moment, so it is
    treated like a missing one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(layout.summary.read_text())["wall_seconds"]
    return None


def _last_scores(context: RunContext, summaries: dict[str, dict[str, Any]]) -> dict[str, dict]:
    """Per held-out source: score before and after the last scored stage, and chance level."""
    last = next((s for s in reversed(summaries.values()) if s["heldout"]), None)
    if last is None:
        return {}
    # A source may have been added after the stage began, so it may have no score from before.
    before, after = last["heldout_before"] or {}, last["heldout"]
    chance = last["chance"] or chance_levels(context.data, after)
    return {
        source: {"before": before.get(source), "after": score, "chance": chance[source]}
        for source, score in after.items()
    }
