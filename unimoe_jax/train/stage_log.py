"""Collect the metrics of steps, and write a record every few steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unimoe_jax.config import MODULES
from unimoe_jax.config.media import MODALITY
from unimoe_jax.metrics.progress import Progress
from unimoe_jax.metrics.records import MetricsWriter
from unimoe_jax.metrics.series import metric_name
from unimoe_jax.stages.losses import MODALITY_LOSSES
from unimoe_jax.train.summary import StageSummary


@dataclass
class StageLog:
    """Collects step metrics between records.

    every: steps between two records. steps: length of the stage.
    imbalance: step index -> how unevenly the step's work is spread over data shards.
    unwritten: the latest step that is not in metrics.jsonl yet, with its signature and metrics.
    waited: seconds spent waiting for data since the time `since`.
    sums: metrics that are added up between records. latest: the newest value of every metric.
    total_tokens, total_seconds: of all runs of the stage, for its mean speed.
    """

    writer: MetricsWriter
    progress: Progress
    summary: StageSummary
    every: int
    steps: int
    imbalance: Callable[[int], dict[str, float]]
    tokens: float = 0.0
    skipped: int = 0
    unwritten: tuple[int, frozenset, dict] | None = None
    waited: float = 0.0
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    latest: dict[str, np.ndarray] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    total_tokens: float = 0.0
    total_seconds: float = 0.0

    def add(self, step: int, signature: frozenset, metrics: dict) -> None:
        """Read the metrics of a step; this waits until the devices have finished the step."""
        metrics = {name: np.asarray(value) for name, value in metrics.items()}
        # Statistics of the encoder's routers are missing in a step without images; the last step
        # that had some keeps standing for them.
        self.latest |= metrics
        self.tokens += float(metrics["tokens"])
        # A skipped step may have produced NaN, and it changed no parameter, so leave its losses
        # out.
        summed = ("load", "dropped") if metrics["bad"] else ("load", "dropped", "_by_modality")
        for name, value in metrics.items():
            if name.endswith(summed):
                self.sums[name] = self.sums.get(name, 0) + value
        self.skipped += int(metrics["bad"])
        loss = float(metrics["loss"])
        if math.isfinite(loss):
            if self.summary.first_loss is None:
                self.summary.first_loss = loss
            # Batches with other media differ in difficulty, so the last loss is a running mean over
            # about ten steps. Before the tenth step it is the plain mean of all steps.
            mean = self.summary.last_loss
            weight = max(0.1, 1 / step)
            self.summary.last_loss = loss if mean is None else mean + weight * (loss - mean)
        self.unwritten = (step, signature, metrics)
        if step % self.every == 0 or step == self.steps or step == 1:
            self.flush()

    def flush(self) -> None:
        """Write a record of the steps since the last record, if there are any."""
        if self.unwritten is not None:
            self._write(*self.unwritten)

    def _write(self, step: int, signature: frozenset, metrics: dict) -> None:
        seconds = max(1e-9, time.monotonic() - self.since)
        values = {
            "signature": "+".join(sorted(signature)) or "text",
            "loss": float(metrics["loss"]),
            "aux": float(metrics["aux"]),
            "grad_norm": float(metrics["grad_norm"]),
            "lr": float(metrics["lr"]),
            "tokens_per_s": self.tokens / seconds,
            "data_wait_share": self.waited / seconds,
            "skipped": self.skipped,
            "loss_by_modality": self._by_modality(),
            "shard_imbalance": self.imbalance(step - 1),
        }
        losses = [f"modality_{name}" for name in MODALITY_LOSSES]
        values |= {name: float(metrics[name]) for name in losses if name in metrics}
        for module in MODULES:
            values |= self._routers(module)
        self.writer.write(step, values)
        self.progress.update(step, values)
        self.total_tokens += self.tokens
        self.total_seconds += seconds
        self.tokens, self.waited, self.since = 0.0, 0.0, time.monotonic()
        self.sums, self.latest, self.skipped, self.unwritten = {}, {}, 0, None

    def _routers(self, module: str) -> dict[str, Any]:
        """Router metrics of one module; empty if no step since the last record has run them."""
        if metric_name(module, "balance") not in self.latest:
            return {}
        found = {
            "balance": float(self.latest[metric_name(module, "balance")]),
            "router_z": float(self.latest[metric_name(module, "router_z")]),
            "router_entropy": self.latest[metric_name(module, "entropy")].tolist(),
            "expert_load": self.sums[metric_name(module, "load")].tolist(),
        }
        if metric_name(module, "dropped") in self.sums:
            found["dropped"] = float(self.sums[metric_name(module, "dropped")])
        return {metric_name(module, name): value for name, value in found.items()}

    def _by_modality(self) -> dict[str, float]:
        """Mean loss per target token of the samples that hold each modality."""
        if "nll_by_modality" not in self.sums:
            return {}
        nll, targets = self.sums["nll_by_modality"], self.sums["targets_by_modality"]
        return {name: float(nll[i] / targets[i]) for name, i in MODALITY.items() if targets[i]}
