"""The verdict on the routers of a stage, from made-up records."""

import json

import pytest

from unimoe_jax.config import RunConfig
from unimoe_jax.metrics.router_trends import as_json, router_trends, rows_of
from unimoe_jax.metrics.series import by_stage
from unimoe_jax.runtime.files import jsonable

DECODER = ("vocab_size", "hidden_size", "mlp_dim", "num_layers", "num_heads", "num_kv_heads")
ENCODER = ("image_size", "patch_size", "hidden_size", "mlp_dim", "num_heads")
OPTIM = {"learning_rate": 1, "steps": 1}
GOOD = ([1.8, 1.2, 1.1, 1.08], [2.0, 1.0, 0.5, 0.3], [[10, 12], [9, 11]])


def records_of(balance, router_z, load):
    """One stage `s` of the encoder, a record per value; `load`: [layer][expert] of every step."""
    return [
        {
            "stage": "s",
            "step": step,
            "encoder_balance": b,
            "encoder_router_z": z,
            "encoder_expert_load": [[row] for row in load],
        }
        for step, (b, z) in enumerate(zip(balance, router_z, strict=True), 1)
    ]


def run_with(aux) -> RunConfig:
    """A run with one stage `s`, which has experts in encoder and decoder."""
    stage = {
        "name": "s",
        "mixture": {"a": 1},
        "train": [],
        "optim": OPTIM,
        "aux": aux,
        "moe": True,
    }
    data = {"sources": {"a": {"path": "a"}}, "loader": {"row_length": 1, "rows": 1}}
    moe = {"num_experts": 2, "top_k": 1}
    encoder = dict.fromkeys(ENCODER, 1) | {"num_layers": 2, "moe": moe}
    decoder = dict.fromkeys(DECODER, 1) | {"head_dim": 2, "moe": moe}
    model = {"decoder": decoder, "vision": {"encoder": encoder}}
    return RunConfig.model_validate({"name": "x", "model": model, "data": data, "stages": [stage]})


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "falling, balanced, none dead"),
        ({"router_z": [2.0, 1.0, 2.0, 2.5]}, "the z-loss does not fall"),
        ({"router_z": [2.0, 1.0, 2.0, float("nan")]}, "the z-loss does not fall"),
        ({"router_z": [2.0, 1.0, 0.5, float("nan")]}, "falling, balanced, none dead"),
        ({"router_z": [float("nan")] * 4}, "the z-loss does not fall"),
        ({"balance": [1.2, 1.2, 1.3, 1.5]}, "balance does not approach 1"),
        ({"balance": [1.0, 1.0, 1.0, 1.04]}, "falling, balanced, none dead"),
        ({"load": [[10, 12], [0, 22]]}, "1 dead experts"),
        (
            {"load": [[22, 0], [0, 22]], "balance": [1.0, 1.9, 1.9, 1.9]},
            "balance does not approach 1; 2 dead experts",
        ),
    ],
)
def test_verdict_on_router_trends(changes, verdict):
    """A run that does not show the published trends says so."""
    values = dict(zip(("balance", "router_z", "load"), GOOD, strict=True)) | changes
    stages = by_stage(records_of(**values))
    trends = router_trends(stages, run_with({"encoder": {"router_z": 0.1}}))
    (trend,) = trends["s"].values()
    assert trend.verdict == verdict
    # summary.json is read again later, with NaN as a string.
    (row,) = rows_of(json.loads(json.dumps(jsonable(as_json(trends)))))
    assert row[0] == "s encoder" and row[-1] == verdict


def test_only_routers_with_losses_are_judged():
    stages = by_stage(records_of(*GOOD))
    assert router_trends(stages, run_with({})) == {}
    assert router_trends(stages, run_with({"decoder": {"balance": 0.1}})) == {}
    (row,) = rows_of(as_json(router_trends(stages, run_with({"encoder": {"balance": 0.1}}))))
    assert row[:4] == ["s encoder", "1.800 → 1.080", "2 → 0.3", "45.0 %"]
