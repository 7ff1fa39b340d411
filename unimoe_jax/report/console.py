"""The result block that is printed at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from unimoe_jax.metrics.progress import format_seconds
from unimoe_jax.metrics.router_trends import HEAD, rows_of
from unimoe_jax.report.numbers import format_number, format_percent


def result_block(summary: Mapping[str, Any], run_dir: str | os.PathLike | None = None) -> str:
    """The block printed at the end of a run; `summary` has the shape of summary.json.

    `run_dir` is where the run lies (default: `summary["run_dir"]`, left out if there is none).
    """
    title = f"── {summary['name']}: {what_finished(summary)} "
    lines = ["", title + "─" * max(0, 78 - len(title))]
    rows = [["stage", "steps", "loss", "tokens/s", "time"]]
    for name, stage in summary["stages"].items():
        loss = f"{format_number(stage.get('first_loss'))} → {format_number(stage.get('last_loss'))}"
        speed = format_number(stage.get("tokens_per_s"), "{:,.0f}")
        seconds = format_seconds(stage["seconds"])
        rows.append([name, str(stage["steps"]), loss, speed, seconds])
    lines += [*_text_table(rows), *_sample_lines(summary["stages"])]
    if summary.get("heldout"):
        rows = [["held-out exact match", "before → after", "chance"]]
        for task, score in summary["heldout"].items():
            change = f"{format_percent(score.get('before'))} → {format_percent(score.get('after'))}"
            rows.append([task, change, format_percent(score.get("chance"))])
        lines += ["", *_text_table(rows)]
    if summary.get("routers"):
        lines += ["", *_text_table([list(HEAD), *rows_of(summary["routers"])])]
    lines.append("")
    run_dir = run_dir or summary.get("run_dir")
    if run_dir:
        lines.append(f"run directory  {os.fspath(run_dir)}")
    if summary.get("next_command"):
        lines.append(f"next           {summary['next_command']}")
    return "\n".join([*lines, "─" * 78])


def what_finished(summary: Mapping[str, Any]) -> str:
    """The run, or some of its stages, and how long they took."""
    done, planned = len(summary["stages"]), summary.get("stages_in_all", 0)
    what = f"{done} of {planned} stages finished" if done < planned else "finished"
    return f"{what} in {format_seconds(float(summary['seconds']))}"


def _sample_lines(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of the samples that stages skipped, truncated or capped, by reason; of none, nothing.

    Reads `samples` of a stage, as `Tally.as_json` gives it; stages of earlier versions have none.
    """
    rows = []
    for name, stage in stages.items():
        found = dict(stage.get("samples") or {"total": 0})
        total = found.pop("total")
        for kind, reasons in found.items():
            rows += [[name, f"{kind}: {why}", f"{n:,} of {total:,}"] for why, n in reasons.items()]
    return ["", *_text_table([["stage", "bad or cut", "samples"], *rows])] if rows else []


def _text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("   ".join(cells).rstrip())
    return lines
