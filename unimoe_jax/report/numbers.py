"""Numbers as text, and the facts of a stage that are computed from its records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unimoe_jax.metrics.progress import format_seconds
from unimoe_jax.metrics.series import expert_load, layer_series, metric_name, series


class ReportError(ValueError):
    """A run directory from which no report can be made; the message names the missing file."""


def format_number(value: Any, shape: str = "{:.4f}") -> str:
    """Format a number. A missing value becomes a dash; "nan" and "inf" stay visible."""
    # metrics.jsonl and summary.json store NaN and infinities as strings, which float() reads.
    return "–" if value is None else shape.format(float(value))


def format_percent(value: Any) -> str:
    """Format a share between 0 and 1 in per cent. A missing value becomes a dash."""
    return format_number(None if value is None else 100 * float(value), "{:.1f} %")


def finished_text(summary: Mapping[str, Any]) -> str:
    """How much of the run has finished, and how long it took: `finished in 48.2 s`."""
    finished, planned = len(summary["stages"]), summary.get("stages_in_all", 0)
    subject = f"{finished} of {planned} stages finished" if finished < planned else "finished"
    return f"{subject} in {format_seconds(float(summary['seconds']))}"


def scored_stage(stages: Mapping[str, Mapping]) -> str:
    """The stage whose scores are `heldout` of summary.json: the last stage that was scored.

    Returns "" if no stage was scored.
    """
    return next((name for name in reversed(list(stages)) if stages[name].get("heldout")), "")


def stage_facts(records: Sequence[Mapping]) -> dict[str, Any]:
    """The entry in summary.json of a stage that has not finished, computed from its records."""
    losses = [r["loss"] for r in records if r.get("loss") is not None]
    speeds = [float(r["tokens_per_s"]) for r in records if r.get("tokens_per_s") is not None]
    return {
        "steps": records[-1]["step"],
        "seconds": float(records[-1]["time"]) - float(records[0]["time"]),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "tokens_per_s": float(np.median(speeds)) if speeds else None,
        "heldout": None,
    }


def router_facts(records: Sequence[Mapping], module: str) -> list[str] | None:
    """Five cells about the routers of one module in one stage, or None if it has no routers.

    The cells are the entropy at the start and at the end (in nats, mean over layers), the largest
    possible entropy, the largest share that one expert has in a layer, and the share of slots that
    were dropped.
    """
    _, entropy = layer_series(records, metric_name(module, "router_entropy"))
    load = expert_load(records, module)  # [layer, modality, expert]
    if not len(entropy) and load is None:
        return None
    largest_share = entropy_limit = None
    if load is not None:
        entropy_limit = math.log(load.shape[-1])
        load_per_expert = load.sum(axis=1)
        load_per_layer = load_per_expert.sum(axis=1, keepdims=True)
        largest_share = np.max(load_per_expert / np.maximum(load_per_layer, 1))
    return [
        format_number(entropy[0].mean() if len(entropy) else None, "{:.3f}"),
        format_number(entropy[-1].mean() if len(entropy) else None, "{:.3f}"),
        format_number(entropy_limit, "{:.3f}"),
        format_percent(largest_share),
        format_percent(_share_dropped(records, module)),
    ]


def _share_dropped(records: Sequence[Mapping], module: str) -> float | None:
    """The share of all slots of a stage that were dropped, or None if no slot could be dropped."""
    _, dropped = series(records, metric_name(module, "dropped"))
    if not len(dropped):
        return None
    name = metric_name(module, "expert_load")
    slots = sum(np.sum(record.get(name, 0)) for record in records)
    return dropped.sum() / max(slots, 1)
