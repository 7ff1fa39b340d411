"""Metrics records -> arrays over steps, for the figures and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Stages = dict[str, list[dict]]


def metric_name(module: str, name: str) -> str:
    """What metric `name` of a module's routers is called: the decoder's bare, `encoder_name`."""
    return name if module == "decoder" else f"{module}_{name}"


def by_stage(records: Sequence[Mapping[str, Any]]) -> Stages:
    """The records of every stage, in order of appearance."""
    stages: Stages = {}
    for record in records:
        stages.setdefault(record["stage"], []).append(record)
    return stages


def series(records: Sequence[Mapping], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(step, value) float64 arrays of the records that have `name`; NaN and infinities stay."""
    found = [(r["step"], float(r[name])) for r in records if r.get(name) is not None]
    array = np.array(found, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def layer_series(records: Sequence[Mapping], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(step [N], value [N, L]) of a metric with one number per layer."""
    found = [(r["step"], [float(v) for v in r[name]]) for r in records if r.get(name)]
    return np.array([s for s, _ in found], np.float64), np.array([v for _, v in found], np.float64)


def expert_load(
    records: Sequence[Mapping], module: str = "decoder", last_share: float = 0.25
) -> np.ndarray | None:
    """Token counts [layer, modality, expert] summed over the last `last_share` of the records."""
    name = metric_name(module, "expert_load")
    counts = [np.asarray(r[name], np.float64) for r in records if r.get(name)]
    if not counts:
        return None
    return np.sum(counts[-max(1, math.ceil(len(counts) * last_share)) :], axis=0)


def dropped_share(records: Sequence[Mapping], module: str) -> tuple[np.ndarray, np.ndarray]:
    """(step, share of the slots since the record before that were over the experts' capacity).

    Not how many: records tell of different numbers of steps. A token has `top_k` slots per layer.
    """
    dropped, load = (metric_name(module, name) for name in ("dropped", "expert_load"))
    found = [
        {"step": r["step"], "share": float(r[dropped]) / max(np.sum(r[load]), 1)}
        for r in records
        if r.get(dropped) is not None and r.get(load)
    ]
    return series(found, "share")


def losses_by_modality(records: Sequence[Mapping]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(step, loss) per modality, from the records that hold `loss_by_modality`."""
    found: dict[str, list[dict]] = {}
    for record in records:
        for modality, loss in record.get("loss_by_modality", {}).items():
            found.setdefault(modality, []).append({"step": record["step"], "loss": loss})
    return {modality: series(found[modality], "loss") for modality in sorted(found)}
