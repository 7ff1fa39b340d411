"""One training step on every kind of mesh equals the step on one device.

The model is the smallest one with all modalities, adapters with dropout, router losses, packed
rows, and experts in every layer of the decoder and of the image encoder and in its connector. All
parameters train. There are two routings: random routers, and routers that send every token to
expert 2 and none to the experts from 3 on. One test splits the batch into micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import optax
import pytest

from tests.close import assert_close
from tests.models.tiny import decoder_config, make_batch, model_config, random_params
from unimoe_jax.config import (
    AuxLossConfig,
    DataConfig,
    LoaderConfig,
    LoRARule,
    MeshConfig,
    MlpConnectorConfig,
    MoEConfig,
    OptimConfig,
    PrecisionConfig,
    RouterLossConfig,
    Rule,
    RunConfig,
    SourceConfig,
    StageConfig,
)
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.data.batch import Batch
from unimoe_jax.nn.moe import exchange
from unimoe_jax.parallel.placement import place, to_devices
from unimoe_jax.parallel.sharding import MESH_AXES, make_mesh, replicated, use_mesh
from unimoe_jax.params.paths import Flat
from unimoe_jax.params.table import split
from unimoe_jax.stages.stage import Stage, build_stage
from unimoe_jax.stages.train_step import init_state, make_train_step

ROWS, LENGTH, EXPERTS = 8, 18, 8
TOLERANCE = 1e-5
# Sizes of the mesh axes -> form of exchange.
MESHES = {
    (8, 1, 1, 1): "auto",
    (1, 8, 1, 1): "auto",
    (1, 1, 8, 1): "all_to_all",
    (1, 1, 1, 8): "auto",
    (2, 2, 2, 1): "gather",
    (1, 2, 2, 2): "all_to_all",
    (2, 1, 4, 1): "all_to_all",
}
ROUTERS = ("random", "one_expert")
ACCUMULATE, GROUPS = 2, 4


@pytest.fixture(scope="module", autouse=True)
def small_exchanges():
    """Make buffers hold four tokens, so that 18 tokens per device need several rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "pair_capacity", lambda *sizes: 4)
        yield


def run_config(form: str, additive: bool = False) -> tuple[RunConfig, StageConfig]:
    """A run with one stage that trains everything.

    additive: leave out dropout and balance loss, which depend on how rows are split into batches,
    and set a capacity, which does not depend on it.
    """
    limit = 0.5 if additive else None
    moe = MoEConfig(num_experts=EXPERTS, top_k=2, exchange=form, capacity_factor=limit)
    decoder = decoder_config(
        num_layers=2, num_kv_heads=2, mlp_dim=16, moe=moe, remat=True, head_dim=4
    )
    losses = RouterLossConfig(balance=0.0 if additive else 0.1, router_z=0.01)
    dropout = 0.0 if additive else 0.2
    adapters = "decoder/.*/(attention|experts)/.*"
    stage = StageConfig(
        name="tune",
        mixture={"text": 1.0},
        moe=True,
        train=(Rule(match=".*", lr=1),),
        lora=(LoRARule(match=adapters, rank=2, alpha=2, dropout=dropout),),
        aux=AuxLossConfig(decoder=losses, encoder=losses, connector=losses),
        # With a small eps, Adam would turn a gradient that is only rounding noise into a full step.
        optim=OptimConfig(learning_rate=1e-2, steps=10, warmup_ratio=0, eps=1e-3, clip_norm=1.0),
    )
    model = model_config(True, decoder=decoder)
    former = model.audio.connector.model_copy(update={"num_layers": 1})
    beats = model.audio.encoder.model_copy(update={"embed_size": 8, "num_heads": 8})
    audio = model.audio.model_copy(update={"connector": former, "encoder": beats})
    clip = model.vision.encoder.model_copy(update={"moe": moe})
    sparse = {"encoder": clip, "connector": MlpConnectorConfig(moe=moe)}
    vision = model.vision.model_copy(update=sparse)
    run = RunConfig(
        name="test",
        model=model.model_copy(update={"audio": audio, "vision": vision}),
        data=DataConfig(
            sources={"text": SourceConfig(path="none.json")},
            loader=LoaderConfig(row_length=LENGTH, rows=ROWS),
        ),
        stages=(stage,),
        precision=PrecisionConfig(compute="float32", frozen="float32"),
    )
    return run, stage


@cache
def batch() -> Batch:
    return make_batch(run_config("auto")[0].model, ROWS, LENGTH, ROWS, media=True)


def built(form: str, devices, sizes: tuple[int, ...], additive: bool = False, rules=None):
    run, config = run_config(form, additive)
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))), devices)
    with use_mesh(mesh, rules):
        stage = build_stage(resolve_stage(run, config), mesh, steps=10)
    # A trace with decay 0 is the gradient itself.
    return replace(stage, optimizer=optax.chain(optax.trace(0.0), stage.optimizer)), mesh


@cache
def params(routers: str) -> Flat:
    """Parameters by path, the same for every mesh.

    With "one_expert", the logits of a token are (s, −s, 0, 0, …). Whatever the sign of s is, expert
    2 is the second choice.
    """
    stage, _ = built("auto", jax.devices()[:1], (1, 1, 1, 1))
    values = random_params(stage.model, batch())
    if routers == "one_expert":
        for path in [path for path in values if path.endswith("router/linear/kernel")]:
            kernel = np.zeros(values[path].shape, np.float32)
            kernel[..., 0] = values[path][..., 0]
            kernel[..., 1] = -kernel[..., 0]
            values[path] = kernel
    return {path: np.asarray(value) for path, value in values.items()}


def steps(form: str, devices, sizes: tuple[int, ...]) -> dict:
    """Run one step with each routing: {routing: (metrics, gradients, parameters afterwards)}."""
    stage, mesh = built(form, devices, sizes)
    run = program(stage, mesh)
    return {name: one_step(stage, mesh, params(name), run) for name in ROUTERS}


def program(stage: Stage, mesh, accumulate: int = 1, groups: int = 1):
    step = make_train_step(
        stage.model, stage.optimizer, stage.schedule, stage.settings.config.aux, accumulate, groups
    )
    return jax.jit(step, out_shardings=(stage.state_shardings(mesh), replicated(mesh)))


def one_step(stage: Stage, mesh, values: Flat, run, rules=None):
    with use_mesh(mesh, rules):
        placed = {path: place(value, stage.shardings[path]) for path, value in values.items()}
        trained, frozen = split(placed, stage.infos)
        state = init_state(trained, stage.optimizer, seed=3)
        state, metrics = run(state, frozen, to_devices(batch(), mesh))
    return jax.device_get((metrics, state.optimizer[0].trace, state.trained))


@pytest.fixture(scope="module")
def expected(small_exchanges):
    return steps("auto", jax.devices()[:1], (1, 1, 1, 1))


def test_the_two_routings_send_tokens_as_described(expected):
    load = {name: metrics["load"].sum(1) for name, (metrics, _, _) in expected.items()}
    tokens = float(expected["random"][0]["tokens"])
    assert (load["one_expert"][:, 2] == tokens).all()
    assert (load["one_expert"][:, 3:] == 0).all()
    assert (load["random"] > 0).all()


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_equals_one_device(devices, expected, sizes):
    results = steps(MESHES[sizes], devices, sizes)
    for name in ROUTERS:
        assert_same(results[name], expected[name])


def assert_same(actual, expected, unlike: tuple[str, ...] = ()) -> None:
    """Assert that metrics, gradients and parameters afterwards are equal.

    Metrics whose name ends with one of `unlike` are not compared.
    """
    metrics, gradients, params_after = actual
    expected_metrics, expected_gradients, expected_params = expected
    compared, expected_compared = (
        {name: value for name, value in m.items() if not name.endswith(unlike)}
        for m in (metrics, expected_metrics)
    )
    assert_close(compared, expected_compared, TOLERANCE)
    # Some gradients are zero up to rounding, like the gradient of a key's bias. Their error is
    # compared with 1 % of the norm of all gradients.
    norm = float(optax.tree.norm(expected_gradients))
    assert_close(gradients, expected_gradients, TOLERANCE, floor=0.01 * norm)
    assert_close(params_after, expected_params, TOLERANCE)


def test_micro_batches_on_an_expert_mesh(devices):
    """Micro-batches on a mesh equal micro-batches on one device.

    They also equal one batch of all rows if the loss is a plain sum over tokens. All kernels, not
    only those of experts, are cut over the expert axis too.
    """

    def step_on(devices, sizes, accumulate: int):
        rules = {"embed": ("fsdp", "expert")}
        stage, mesh = built("all_to_all", devices, sizes, additive=True, rules=rules)
        cut = math.prod(sizes)
        for path, info in stage.infos.items():
            if path.endswith(("q_proj/kernel", "experts/fc1/kernel")):
                held = stage.shardings[path].shard_shape(info.shape)
                assert math.prod(held) * cut == math.prod(info.shape), path
        run = program(stage, mesh, accumulate, GROUPS)
        return one_step(stage, mesh, params("random"), run, rules)

    counts = batch().weight_BT.reshape(GROUPS, ACCUMULATE, -1).sum((0, 2))
    assert counts[0] != counts[1]
    actual = step_on(devices[:GROUPS], (1, 2, 2, 1), ACCUMULATE)
    assert min(actual[0][name] for name in ("dropped", "encoder_dropped", "connector_dropped")) > 0
    assert_same(actual, step_on(devices[:1], (1, 1, 1, 1), ACCUMULATE))
    joined = step_on(devices[:1], (1, 1, 1, 1), 1)
    # Balance and entropy are no sums over tokens, so their mean over micro-batches is different.
    assert_same(actual, joined, unlike=("balance", "entropy"))
