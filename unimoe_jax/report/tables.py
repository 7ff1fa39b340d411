"""The tables of report.html, as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unimoe_jax.config import MODULES
from unimoe_jax.metrics.progress import format_seconds
from unimoe_jax.metrics.router_trends import HEAD, rows_of
from unimoe_jax.metrics.series import Stages
from unimoe_jax.report.numbers import format_number, format_percent, router_facts, scored_stage


class Table(NamedTuple):
    """A table of text; `note` is shown above it and says how to read it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def stage_table(facts: Mapping[str, Mapping[str, Any]]) -> Table:
    """Steps, time, loss and speed of every stage; `facts` is like `stages` of summary.json."""
    head = ["stage", "steps", "time", "first loss", "last loss", "tokens/s"]
    rows = [
        [
            name,
            f"{stage['steps']:,}",
            format_seconds(float(stage["seconds"])),
            format_number(stage.get("first_loss")),
            format_number(stage.get("last_loss")),
            format_number(stage.get("tokens_per_s"), "{:,.0f}"),
        ]
        for name, stage in facts.items()
    ]
    return Table(head, rows)


def heldout_tables(summary: Mapping[str, Any], facts: Mapping[str, Mapping]) -> list[Table]:
    """Up to two tables of held-out exact match.

    The first compares the scores before and after the last scored stage with chance. The second
    follows, if several stages were scored, with the scores at the end of each of them.
    """
    tables = []
    if summary.get("heldout"):
        stage = scored_stage(summary.get("stages", {}))
        rows = [
            [task, *(format_percent(score.get(key)) for key in ("before", "after", "chance"))]
            for task, score in summary["heldout"].items()
        ]
        tables.append(Table(["task", f"before {stage}", f"after {stage}", "chance"], rows))
    scores = {name: stage["heldout"] for name, stage in facts.items() if stage.get("heldout")}
    if len(scores) > 1:
        tasks = dict.fromkeys(task for stage_scores in scores.values() for task in stage_scores)
        rows = [
            [task, *(format_percent(stage_scores.get(task)) for stage_scores in scores.values())]
            for task in tasks
        ]
        tables.append(Table(["task", *scores], rows, "Scores at the end of each stage."))
    return tables


def router_table(stages: Stages) -> Table | None:
    """Entropy and load of the routers, a row per stage and module; None without routers."""
    rows = []
    for name, records in stages.items():
        for module in MODULES:
            if cells := router_facts(records, module):
                rows.append([f"{name} {module}", *cells])
    if not rows:
        return None
    head = [
        "stage",
        "entropy at start",
        "entropy at end",
        "limit (ln E)",
        "largest expert share",
        "dropped slots",
    ]
    note = (
        "Entropy is in nats, averaged over the layers; it reaches its limit when all E experts are "
        "equally likely. The largest expert share is that of one expert in one layer, over the "
        "last quarter of the stage. A token has one slot with each of its experts in each layer; "
        "slots above an expert's capacity are dropped."
    )
    return Table(head, rows, note)


def trend_table(summary: Mapping[str, Any]) -> Table | None:
    """Router losses and the verdict on them; None if no stage was trained with router losses."""
    if not summary.get("routers"):
        return None
    head = ["stage", *HEAD[1:-1], "verdict"]
    note = (
        "First value → mean of the last quarter. The balance loss is about 1 when all experts are "
        "used equally. Least used is the smallest share of one expert in one layer, over the last "
        "quarter."
    )
    return Table(head, rows_of(summary["routers"]), note)
