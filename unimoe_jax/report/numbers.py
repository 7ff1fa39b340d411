"""The numbers of a report as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unimoe_jax.metrics.series import expert_load, layer_series, metric_name, series


class ReportError(ValueError):
    """The run directory cannot be reported on; says what is missing or broken."""


def format_number(value: Any, shape: str = "{:.4f}") -> str:
    """`value` in words: what is missing is a dash, "nan" and "inf" stay visible."""
    return "–" if value is None else shape.format(float(value))


def format_percent(value: Any) -> str:
    return format_number(None if value is None else 100 * float(value), "{:.1f} %")


def stage_facts(records: Sequence[Mapping]) -> dict[str, Any]:
    """The summary of a stage that has none yet, from its records."""
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
    """Entropy at the start and end, its limit, the largest expert share, dropped slots."""
    _, entropy = layer_series(records, metric_name(module, "router_entropy"))
    load = expert_load(records, module)
    if not len(entropy) and load is None:
        return None
    _, dropped = series(records, metric_name(module, "dropped"))
    name = metric_name(module, "expert_load")
    slots = sum(np.sum(r.get(name, 0)) for r in records) if len(dropped) else 0
    largest = limit = None
    if load is not None:
        limit = math.log(load.shape[-1])
        per_expert = load.sum(axis=1)
        total = per_expert.sum(axis=1, keepdims=True)
        largest = np.max(per_expert / np.maximum(total, 1))
    return [
        format_number(entropy[0].mean() if len(entropy) else None, "{:.3f}"),
        format_number(entropy[-1].mean() if len(entropy) else None, "{:.3f}"),
        format_number(limit, "{:.3f}"),
        format_percent(largest),
        format_percent(dropped.sum() / max(slots, 1) if len(dropped) else None),
    ]
