"""The result block that a run prints when it has finished."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unimoe_jax.metrics.progress import format_seconds
from unimoe_jax.metrics.router_trends import HEAD, rows_of
from unimoe_jax.report.numbers import finished_text, format_number, format_percent

RULE_WIDTH = 78
COLUMN_GAP = 3
UNLIMITED_WIDTH = 10_000
"""Wider than any table, so that rich neither wraps nor shortens cells in a narrow terminal."""


def print_result_block(
    summary: Mapping[str, Any], run_dir: str | os.PathLike | None = None
) -> None:
    """Print the result block, with colours if standard output is a terminal."""
    # Not rich's own print: rich ends the process by itself when the reader of a pipe has gone.
    print(result_block(summary, run_dir, colours=sys.stdout.isatty()))


def result_block(
    summary: Mapping[str, Any],
    run_dir: str | os.PathLike | None = None,
    *,
    colours: bool = False,
) -> str:
    """The block printed at the end of a run; `summary` has the shape of summary.json.

    `run_dir` is the directory of the run (default: `summary["run_dir"]`; the line is left out if
    there is none). Without `colours` the text is plain, and the same on every machine.
    """
    title = f"── {summary['name']}: {finished_text(summary)} "
    tables = [
        stage_table(summary["stages"]),
        sample_table(summary["stages"]),
        heldout_table(summary.get("heldout") or {}),
        router_table(summary.get("routers") or {}),
    ]
    console = Console(
        file=io.StringIO(),
        width=UNLIMITED_WIDTH,
        force_terminal=colours,
        # Names in a run may contain square brackets or colons, which are no markup.
        markup=False,
        emoji=False,
        highlight=False,
    )
    with console.capture() as capture:
        console.print()
        console.print(Text(title + "─" * max(0, RULE_WIDTH - len(title)), "bold"))
        for table in tables:
            if table.row_count:
                console.print(table)
                console.print()
        for line in _closing_lines(summary, run_dir):
            console.print(line)
        console.print("─" * RULE_WIDTH, end="")
    # rich fills every cell up to the width of its column.
    lines = [line.rstrip() for line in capture.get().split("\n")]
    return "\n".join(lines)


def stage_table(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    """Steps, first and last loss, speed and time of every stage."""
    table = _table(["stage", "steps", "loss", "tokens/s", "time"])
    for name, stage in stages.items():
        first, last = (format_number(stage.get(key)) for key in ("first_loss", "last_loss"))
        table.add_row(
            name,
            str(stage["steps"]),
            f"{first} → {last}",
            format_number(stage.get("tokens_per_s"), "{:,.0f}"),
            format_seconds(stage["seconds"]),
        )
    return table


def sample_table(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    """The samples that stages skipped, truncated or capped, by reason; no rows if there are none.

    Reads `samples` of a stage, which `Tally.as_json` has written; a stage may lack it.
    """
    table = _table(["stage", "bad or cut", "samples"])
    for name, stage in stages.items():
        counts: dict[str, Any] = dict(stage.get("samples") or {"total": 0})
        total = counts.pop("total")
        for kind, reasons in counts.items():
            for reason, count in reasons.items():
                table.add_row(name, f"{kind}: {reason}", f"{count:,} of {total:,}")
    return table


def heldout_table(heldout: Mapping[str, Mapping[str, Any]]) -> Table:
    """The share of held-out answers that were exactly right, before and after the last stage."""
    table = _table(["held-out exact match", "before → after", "chance"])
    for task, score in heldout.items():
        before, after, chance = (
            format_percent(score.get(k)) for k in ("before", "after", "chance")
        )
        table.add_row(task, f"{before} → {after}", chance)
    return table


def router_table(routers: Mapping[str, Any]) -> Table:
    """Router losses and the verdict on them, from `routers` of summary.json."""
    table = _table(HEAD)
    # The last column is the verdict: words, which read better from the left.
    table.columns[-1].justify = "left"
    for row in rows_of(routers):
        table.add_row(*row)
    return table


def _table(head: Sequence[str]) -> Table:
    """An empty table without lines: names on the left, numbers on the right of their columns."""
    table = Table(box=None, pad_edge=False, padding=(0, COLUMN_GAP, 0, 0), header_style="bold")
    for number, title in enumerate(head):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    return table


def _closing_lines(summary: Mapping[str, Any], run_dir: str | os.PathLike | None) -> Iterator[str]:
    """The directory of the run and the command to try next."""
    run_dir = run_dir or summary.get("run_dir")
    if run_dir:
        yield f"run directory  {os.fspath(run_dir)}"
    if summary.get("next_command"):
        yield f"next           {summary['next_command']}"
