"""Did the router losses of a stage have their effect? One verdict per module with experts.

In the published runs (arXiv 2405.05949; a public log of one of them) the z-loss falls, the balance
loss approaches 1, and every expert is used. The balance loss is 1 if all experts are equally likely
and chosen equally often. The verdict names each of the three effects that a run does not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from unimoe_jax.config import MODULES, ModuleName, RunConfig
from unimoe_jax.metrics.series import Stages, expert_load, metric_name, series

FLOOR = 1.0
"""The balance loss of experts that are equally likely and equally chosen."""
NEAR_FLOOR = 0.05
"""A balance loss this close to `FLOOR` counts as balanced, even if it was closer at the start."""
DEAD = 0.01
"""An expert that gets less than this part of an equal share of a layer's tokens is dead."""
LAST_PART = 4
"""Values at the end are means over the last 1/4 of the records."""


@dataclass(frozen=True)
class Trend:
    """The routers of one module in one stage.

    balance, router_z: (start, end) of a loss: the first finite record, and the mean of the last
        quarter of the finite records.
    least_used: the smallest share that any expert has of its layer's tokens in the last quarter.
    dead: the number of dead experts in all layers.
    """

    balance: tuple[float, float]
    router_z: tuple[float, float]
    least_used: float
    dead: int

    @property
    def against(self) -> list[str]:
        """The differences from the published runs; empty if there are none."""
        (z_first, z_last), (first, last) = self.router_z, self.balance
        differences = []
        # Both conditions are written so that NaN counts as a difference.
        if not z_last < z_first:
            differences.append("the z-loss does not fall")
        if not (abs(last - FLOOR) <= NEAR_FLOOR or abs(last - FLOOR) < abs(first - FLOOR)):
            differences.append("balance does not approach 1")
        if self.dead:
            differences.append(f"{self.dead} dead experts")
        return differences

    @property
    def verdict(self) -> str:
        """The differences in one line of text, or a line that says there are none."""
        return "; ".join(self.against) or "falling, balanced, none dead"


def router_trends(stages: Stages, run: RunConfig) -> dict[str, dict[ModuleName, Trend]]:
    """{stage: {module: trend}} of all modules with router losses that the stage's records hold."""
    trends: dict[str, dict[ModuleName, Trend]] = {}
    for stage in run.stages:
        for module in MODULES:
            losses = getattr(stage.aux, module)
            trend = _trend(stages.get(stage.name, ()), module)
            if trend and (losses.balance or losses.router_z):
                trends.setdefault(stage.name, {})[module] = trend
    return trends


def _trend(records: Sequence[Mapping[str, Any]], module: ModuleName) -> Trend | None:
    """The trend of one module in one stage, or None if its records lack a router metric."""
    balance = _ends(records, metric_name(module, "balance"))
    router_z = _ends(records, metric_name(module, "router_z"))
    load = expert_load(records, module)
    if balance is None or router_z is None or load is None:
        return None
    # [layer, modality, expert] -> the share of every expert in the tokens of its layer.
    per_expert = load.sum(axis=1)
    share = per_expert / np.maximum(per_expert.sum(axis=1, keepdims=True), 1)
    dead = int((share < DEAD / share.shape[1]).sum())
    return Trend(balance, router_z, float(share.min()), dead)


def _ends(records: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float] | None:
    """(first value, mean of the last quarter) of a metric; None if no record has it."""
    _, value = series(records, name)
    if not len(value):
        return None
    # A skipped step may have produced NaN, and it changed no parameter, so leave it out.
    finite = value[np.isfinite(value)]
    value = finite if len(finite) else value
    return float(value[0]), float(value[-max(1, len(value) // LAST_PART) :].mean())


def as_json(trends: Mapping[str, Mapping[ModuleName, Trend]]) -> dict[str, Any]:
    """Trends and verdicts as plain values for summary.json, where `rows_of` reads them."""
    return {
        stage: {
            module: asdict(trend) | {"verdict": trend.verdict} for module, trend in modules.items()
        }
        for stage, modules in trends.items()
    }


HEAD = ("routers", "balance", "z-loss", "least used", "")
"""Column titles for `rows_of`."""


def rows_of(summary: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table under `HEAD`, one per stage and module.

    summary: the result of `as_json`, or the same read from summary.json, where NaN is "nan".
    """
    rows = []
    for stage, trends in summary.items():
        for module, trend in trends.items():
            first, last = (f"{float(value):.3f}" for value in trend["balance"])
            z_first, z_last = (f"{float(value):.3g}" for value in trend["router_z"])
            least = f"{100 * float(trend['least_used']):.1f} %"
            cells = [f"{first} → {last}", f"{z_first} → {z_last}", least, trend["verdict"]]
            rows.append([f"{stage} {module}", *cells])
    return rows
