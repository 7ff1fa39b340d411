"""Records of metrics.jsonl -> arrays over steps, for figures, reports and the progress line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Stages = dict[str, list[Mapping[str, Any]]]
"""{stage: its records}."""


def metric_name(module: str, name: str) -> str:
    """The key of a router metric in a record: `name` for the decoder, else e.g. `encoder_name`."""
    return name if module == "decoder" else f"{module}_{name}"


def by_stage(records: Sequence[Mapping[str, Any]]) -> Stages:
    """The records of every stage, in the order in which stages and records appear."""
    stages: Stages = {}
    for record in records:
        stages.setdefault(record["stage"], []).append(record)
    return stages


def series(records: Sequence[Mapping], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(step, value) float64 arrays of the records that have `name`; NaN and infinities stay."""
    points = [(r["step"], float(r[name])) for r in records if r.get(name) is not None]
    # The reshape gives two columns even if there are no points.
    array = np.array(points, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def layer_series(records: Sequence[Mapping], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(step [N], value [N, L]) float64 arrays of a metric with one number per layer."""
    having = [record for record in records if record.get(name)]
    steps = [record["step"] for record in having]
    values = [[float(value) for value in record[name]] for record in having]
    return np.array(steps, np.float64), np.array(values, np.float64)


def expert_load(
    records: Sequence[Mapping], module: str = "decoder", last_share: float = 0.25
) -> np.ndarray | None:
    """Token slots [layer, modality, expert], summed over the last part of the records.

    Returns None if no record holds them.

    Args:
        module: the module whose experts are counted.
        last_share: the part of the records with counts, from the end; at least one record is used.
    """
    name = metric_name(module, "expert_load")
    counts = [np.asarray(r[name], np.float64) for r in records if r.get(name)]
    if not counts:
        return None
    return np.sum(counts[-max(1, math.ceil(len(counts) * last_share)) :], axis=0)


def dropped_share(records: Sequence[Mapping], module: str) -> tuple[np.ndarray, np.ndarray]:
    """(step, share of the slots since the previous record that exceeded the experts' capacity).

    It is a share and not a number of slots, because records cover different numbers of steps. A
    token has `top_k` slots per layer.
    """
    dropped, load = metric_name(module, "dropped"), metric_name(module, "expert_load")
    shares = [
        {"step": r["step"], "share": float(r[dropped]) / max(np.sum(r[load]), 1)}
        for r in records
        if r.get(dropped) is not None and r.get(load)
    ]
    return series(shares, "share")


def losses_by_modality(records: Sequence[Mapping]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{modality: (step, loss)} from the records that hold `loss_by_modality`."""
    losses: dict[str, list[dict]] = {}
    for record in records:
        for modality, loss in record.get("loss_by_modality", {}).items():
            losses.setdefault(modality, []).append({"step": record["step"], "loss": loss})
    return {modality: series(losses[modality], "loss") for modality in sorted(losses)}
