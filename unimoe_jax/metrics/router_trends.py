"""Whether the routers of a stage went where router losses should lead them.

In the published runs (arXiv 2405.05949; a public log of one) the z-loss falls, the balance loss
approaches 1, which is its value for experts that are equally likely and equally chosen, and every
expert is used. A run shows this or says that it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from unimoe_jax.config import MODULES, ModuleName, RunConfig
from unimoe_jax.metrics.series import Stages, expert_load, metric_name, series

FLOOR = 1.0
NEAR_FLOOR = 0.05
DEAD = 0.01
"""Of an equal share: an expert with less, in any layer, is dead."""
LAST_SHARE = 4


@dataclass(frozen=True)
class Trend:
    """One module's routers in one stage. (start, end): the first record, and the mean over the last
    quarter, of records with numbers; least_used: smallest share of one expert in one layer in the
    last quarter."""

    balance: tuple[float, float]
    router_z: tuple[float, float]
    least_used: float
    dead: int

    @property
    def against(self) -> list[str]:
        """What is not as in the published runs; empty: all is."""
        (z_first, z_last), (first, last) = self.router_z, self.balance
        wrong = []
        if not z_last < z_first:
            wrong.append("the z-loss does not fall")
        if not (abs(last - FLOOR) <= NEAR_FLOOR or abs(last - FLOOR) < abs(first - FLOOR)):
            wrong.append("balance does not approach 1")
        if self.dead:
            wrong.append(f"{self.dead} dead experts")
        return wrong

    @property
    def verdict(self) -> str:
        """In words."""
        return "; ".join(self.against) or "falling, balanced, none dead"


def router_trends(stages: Stages, run: RunConfig) -> dict[str, dict[ModuleName, Trend]]:
    """{stage: {module: trend}} wherever the run has router losses and its records hold them."""
    found: dict[str, dict[ModuleName, Trend]] = {}
    for stage in run.stages:
        for module in MODULES:
            losses = getattr(stage.aux, module)
            trend = _trend(stages.get(stage.name, ()), module)
            if trend and (losses.balance or losses.router_z):
                found.setdefault(stage.name, {})[module] = trend
    return found


def _trend(records: Sequence[Mapping[str, Any]], module: ModuleName) -> Trend | None:
    balance = _ends(records, metric_name(module, "balance"))
    router_z = _ends(records, metric_name(module, "router_z"))
    load = expert_load(records, module)
    if balance is None or router_z is None or load is None:
        return None
    per_expert = load.sum(axis=1)
    share = per_expert / np.maximum(per_expert.sum(axis=1, keepdims=True), 1)
    dead = int((share < DEAD / share.shape[1]).sum())
    return Trend(balance, router_z, float(share.min()), dead)


def _ends(records: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float] | None:
    _, value = series(records, name)
    if not len(value):
        return None
    # What a skipped step made of its tokens may be no number, and says nothing of the routers.
    finite = value[np.isfinite(value)]
    value = finite if len(finite) else value
    return float(value[0]), float(value[-max(1, len(value) // LAST_SHARE) :].mean())


def as_json(trends: Mapping[str, Mapping[ModuleName, Trend]]) -> dict[str, Any]:
    """For summary.json; `rows_of` reads it."""
    return {
        stage: {
            module: asdict(trend) | {"verdict": trend.verdict} for module, trend in found.items()
        }
        for stage, found in trends.items()
    }


HEAD = ("routers", "balance", "z-loss", "least used", "")


def rows_of(summary: Mapping[str, Any]) -> list[list[str]]:
    """Rows under `HEAD` from `as_json`'s result, also as a file gives it back: "nan" for NaN."""
    rows = []
    for stage, found in summary.items():
        for module, trend in found.items():
            first, last = (f"{float(value):.3f}" for value in trend["balance"])
            z_first, z_last = (f"{float(value):.3g}" for value in trend["router_z"])
            least = f"{100 * float(trend['least_used']):.1f} %"
            cells = [f"{first} → {last}", f"{z_first} → {z_last}", least, trend["verdict"]]
            rows.append([f"{stage} {module}", *cells])
    return rows
