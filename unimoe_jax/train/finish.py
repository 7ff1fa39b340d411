"""What a finished stage and a finished run leave behind."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from unimoe_jax.checkpoints.checksums import SUMS, CheckpointError
from unimoe_jax.checkpoints.final import save_final
from unimoe_jax.checkpoints.manifest import MANIFEST, read_manifest
from unimoe_jax.config import RunConfig
from unimoe_jax.evaluate.controls import chance_levels
from unimoe_jax.evaluate.exact_match import is_scorable
from unimoe_jax.metrics.records import METRICS_FILE, read_metrics
from unimoe_jax.metrics.router_trends import as_json, router_trends
from unimoe_jax.metrics.series import by_stage
from unimoe_jax.params.paths import Flat
from unimoe_jax.report.console import result_block
from unimoe_jax.report.page import write_report
from unimoe_jax.runtime.files import write_json_atomic
from unimoe_jax.stages.final_params import results
from unimoe_jax.stages.initial_params import source_folder
from unimoe_jax.stages.stage import Stage
from unimoe_jax.train.context import RunContext
from unimoe_jax.train.summary import read_stage_summary


def leave_results(runtime: RunContext, stage: Stage, params: Flat, folder: Path, summary) -> None:
    """Write what the stage leaves behind, with a manifest of where it came from.

    The summary comes first: a stage whose result is there is finished, and never tells again.
    """
    if runtime.is_writer:
        write_json_atomic(folder.with_name("summary.json"), asdict(summary))
    params, changed = results(stage, params)
    run, config = runtime.run, stage.config
    manifest = {
        "run": run.name,
        "stage": config.name,
        "steps": stage.steps,
        "moe_layers": list(stage.model_config.decoder.moe_layers()),
        "lora_merged": config.merge_lora,
        "parents": {
            name: str(source_folder(runtime.folder, name))
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
    save_final(folder, params, manifest)


def finished_stages(config: RunConfig, folder: Path) -> dict[str, int]:
    """Steps of the stages that are finished; their summaries can be read."""
    found = {stage.name: finished_steps(folder, stage.name) for stage in config.stages}
    done = {name: steps for name, steps in found.items() if steps is not None}
    for name in done:
        read_stage_summary(folder, name)
    return done


def finished_steps(folder: Path, name: str) -> int | None:
    """How many steps the stage has trained, if it has left its result whole; None if it has none.

    Raises:
        CheckpointError: a part of the result is gone.
    """
    final = folder / "checkpoints" / name / "final"
    if not final.exists():  # it comes into its place complete
        return None
    try:
        steps = int(read_manifest(final)["steps"])
        sealed = json.loads((final / SUMS).read_text())
        lost = next((file for file in sealed if not (final / file).is_file()), None)
        problem = lost and f"{final / lost}: missing"
    except CheckpointError as error:
        problem = str(error)
    except (OSError, KeyError, TypeError, ValueError):
        problem = f"{final}: {MANIFEST} or {SUMS} is missing or damaged"
    if problem:
        raise CheckpointError(
            f"stage {name} has finished, but its result is not whole: {problem}; bring it back, or "
            f"remove {final} to train the stage again from its last checkpoint"
        )
    return steps


def next_command(config: RunConfig, folder: Path, done: Collection[str]) -> str:
    """What to try now: the control of the evaluation, if the stage that it scores is `done`."""
    named = shlex.quote(str(folder))
    scored = [stage for stage in config.stages if stage.evaluate]
    if scored and scored[-1].name in done and is_scorable(scored[-1]):
        return f"python -m unimoe_jax.evaluate {named} --shuffle-media"
    return f"python -m unimoe_jax.generate --model {named} --chat"


def finish(runtime: RunContext, seconds: float | None) -> None:
    """summary.json, plots, report, and the block at the end. seconds: that this call took; None if
    it has trained nothing, then the time of the last that has stays."""
    config, folder = runtime.run, runtime.folder
    names = [stage.name for stage in config.stages]
    # A stage writes its summary before its result.
    done = [name for name in names if finished_steps(folder, name) is not None]
    found = {name: read_stage_summary(folder, name) for name in done}
    stages = {name: summary for name, summary in found.items() if summary is not None}
    last = next((s for s in reversed(stages.values()) if s["heldout"]), None)
    # What is scored may have changed between two sittings.
    before, after = (last["heldout_before"] or {}, last["heldout"]) if last else ({}, {})
    levels = (last or {}).get("chance") or chance_levels(runtime.data, after)
    if seconds is None:
        # There may be none, or a damaged one: it is about to be written anew.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            seconds = json.loads((folder / "summary.json").read_text())["wall_seconds"]
    recorded = (folder / METRICS_FILE).exists()
    if not recorded:
        runtime.tell(f"{folder / METRICS_FILE}: missing, so there is no report of the stages")
    records = by_stage(read_metrics(folder)) if recorded else {}
    summary = {
        "name": config.name,
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "wall_seconds": seconds,
        "stages": stages,
        "stages_in_all": len(config.stages),
        "heldout": {
            task: {"before": before.get(task), "after": share, "chance": levels[task]}
            for task, share in after.items()
        },
        "routers": as_json(router_trends(records, config)),
        "run_dir": str(folder),
        "next_command": next_command(config, folder, stages),
    }
    write_json_atomic(folder / "summary.json", summary)
    if config.log.plots and recorded:
        write_report(folder)
    print(result_block(summary, folder))
