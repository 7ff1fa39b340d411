"""A made-up run for the tests of the report: metrics records of stages, and a summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from unimoe_jax.metrics.records import MetricsWriter
from unimoe_jax.metrics.series import metric_name

SIGNATURES = ("text", "image", "audio+image", "speech")

SUMMARY: dict[str, Any] = {
    "name": "tiny <run>",
    "seconds": 48.2,
    "stages": {
        "align": {
            "steps": 60,
            "seconds": 10.0,
            "first_loss": 4.0,
            "last_loss": 1.5,
            "tokens_per_s": 10000.0,
            "heldout": None,
        },
        "tune": {
            "steps": 60,
            "seconds": 200.0,
            "first_loss": 3.9,
            "last_loss": "nan",
            "tokens_per_s": 9000.0,
            "heldout": {"colour": 0.94, "<i>pitch": 0.5},
        },
    },
    "heldout": {
        "colour": {"before": 0.125, "after": 0.94, "chance": 0.125},
        "<i>pitch": {"before": None, "after": 0.5, "chance": 0.25},
    },
    "next_command": "python -m unimoe_jax.generate --run runs/tiny",
}

TREND = {
    "balance": [1.8, 1.08],
    "router_z": [2.0, "nan"],
    "least_used": 0.45,
    "dead": 0,
    "verdict": "the z-loss does not fall",
}
ROUTERS = {"s": {"encoder": TREND}}
"""`routers` of summary.json, as it is read from the file: NaN is the string "nan"."""


def log_stage(
    run_dir: Path,
    name: str,
    *,
    steps: int = 60,
    layers: int = 0,
    experts: int = 4,
    seed: int = 0,
    module: str = "decoder",
    **last: Any,
) -> None:
    """Log a stage to metrics.jsonl of `run_dir`.

    With `layers`, `module` has that many layers with experts. `last` are values of the last step.
    """
    rng = np.random.default_rng(seed)
    preference = rng.dirichlet(np.ones(experts) * 2, (layers, 5))
    with MetricsWriter(run_dir, name, steps) as writer:
        for step in range(1, steps + 1):
            values = {
                "loss": 1 + 3 * np.exp(-step / 20) + 0.1 * rng.normal(),
                "loss_by_modality": {SIGNATURES[step % len(SIGNATURES)]: 3.0 / step + 0.5},
                "lr": 1e-3 * min(1, step / 5) * (1 - step / (steps + 1)),
                "grad_norm": np.exp(rng.normal()),
                "tokens_per_s": 1e4 + 100 * rng.normal(),
            }
            if layers:
                load = rng.multinomial(500, preference)
                load[:, 2] = 0  # this data set has no video
                routers = {
                    "router_entropy": np.log(experts) * np.linspace(0.5, 0.9, layers),
                    "expert_load": load,
                    "balance": 1 + 1 / step,
                    "router_z": 0.1 / step,
                    "dropped": 0,
                }
                values |= {metric_name(module, name): value for name, value in routers.items()}
            if step == steps:
                values |= last
            writer.write(step, values)
