"""The train step (trained parameters, accumulation, bad batches, meshes) and the scoring step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.close import assert_close
from tests.models.tiny import (
    MOE,
    VOCAB,
    decoder_config,
    make_batch,
    model_config,
    random_params,
)
from unimoe_jax.config import (
    AuxLossConfig,
    DataConfig,
    LoaderConfig,
    LoRARule,
    MeshConfig,
    OptimConfig,
    PrecisionConfig,
    RouterConfig,
    RouterLossConfig,
    Rule,
    RunConfig,
    SourceConfig,
    StageConfig,
)
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.data.batch import Batch
from unimoe_jax.parallel.placement import place, to_devices
from unimoe_jax.parallel.sharding import make_mesh, replicated, use_mesh
from unimoe_jax.params.paths import Flat, nest
from unimoe_jax.params.table import split
from unimoe_jax.stages.score_step import make_score_step
from unimoe_jax.stages.stage import Stage, build_stage
from unimoe_jax.stages.train_step import TrainState, init_state, make_train_step, routed

LOSSES = RouterLossConfig(balance=0.1, router_z=0.01, balance_layers="sum")
ROWS, LENGTH, GROUPS = 8, 18, 8
LORA = (LoRARule(match="decoder/.*/(attention|mlp|moe/experts)/.*", rank=2, alpha=2, dropout=0.2),)
TRAIN = (
    Rule(match=".*/lora_[ab]|.*/router/.*", lr=1),
    Rule(match=".*/connector/.*|embed/.*", lr=0.5),
    Rule(match=".*", lr=None),
)


def run_config(media: bool, dropout: bool = True) -> tuple[RunConfig, StageConfig]:
    """A run with one stage that trains adapters, routers, connectors and the embedding."""
    lora = tuple(r.model_copy(update={} if dropout else {"dropout": 0.0}) for r in LORA)
    stage = StageConfig(
        name="tune",
        mixture={"text": 1.0},
        moe=True,
        train=TRAIN,
        lora=lora,
        aux=AuxLossConfig(decoder=LOSSES) if dropout else AuxLossConfig(),
        # With a small eps, Adam would turn a gradient that is only rounding noise into a full step.
        optim=OptimConfig(learning_rate=1e-2, steps=10, warmup_ratio=0, eps=1e-3, clip_norm=1.0),
    )
    data = DataConfig(
        sources={"text": SourceConfig(path="none.json")},
        loader=LoaderConfig(row_length=LENGTH, rows=ROWS),
    )
    run = RunConfig(
        name="test",
        model=model_config(media, decoder=decoder_config(num_layers=1 if media else 2)),
        data=data,
        stages=(stage,),
        precision=PrecisionConfig(compute="float32", frozen="float32"),
    )
    return run, stage


def batch_of(media: bool) -> Batch:
    return make_batch(model_config(media), ROWS, LENGTH, GROUPS, media)


@cache
def start(media: bool) -> Flat:
    """Parameters by path, the same for every mesh."""
    run, stage = run_config(media)
    return random_params(build(run, stage, jax.devices()[:1], MeshConfig()).model, batch_of(media))


def build(run: RunConfig, config: StageConfig, devices, mesh_config: MeshConfig) -> Stage:
    """A stage whose optimizer also keeps the last gradient."""
    mesh = make_mesh(mesh_config, devices)
    with use_mesh(mesh):
        stage = build_stage(resolve_stage(run, config), mesh, steps=10)
    # A trace with decay 0 is the gradient itself.
    return replace(stage, optimizer=optax.chain(optax.trace(0.0), stage.optimizer))


def compiled_step(stage: Stage, mesh, accumulate: int = 1, shards: int = 1):
    step = make_train_step(
        stage.model, stage.optimizer, stage.schedule, stage.settings.config.aux, accumulate, shards
    )
    return jax.jit(step, out_shardings=(stage.state_shardings(mesh), replicated(mesh)))


def one_step(media: bool, devices, mesh_config: MeshConfig):
    """Run the first step; return its metrics, gradients, and the parameters after it."""
    run, config = run_config(media)
    stage, mesh = build(run, config, devices, mesh_config), make_mesh(mesh_config, devices)
    with use_mesh(mesh):
        params = {p: place(np.asarray(v), stage.shardings[p]) for p, v in start(media).items()}
        trained, frozen = split(params, stage.infos)
        state = init_state(trained, stage.optimizer, seed=3)
        batch = to_devices(batch_of(media), mesh)
        state, metrics = compiled_step(stage, mesh)(state, frozen, batch)
    return jax.device_get((metrics, state.optimizer[0].trace, state.trained))


# ------------------------------------------------------------------------- one device


class Single:
    """A train step on one device without dropout, compiled once for several tests."""

    def __init__(self) -> None:
        run, config = run_config(media=False, dropout=False)
        self.stage = build(run, config, jax.devices()[:1], MeshConfig())
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self.trained, self.frozen = split(start(False), self.stage.infos)
        self.batch = jax.tree.map(jnp.asarray, batch_of(False))
        self.step = compiled_step(self.stage, self.mesh)

    def state(self) -> TrainState:
        # Place the state where a step leaves it; otherwise the second step would compile again.
        state = init_state(self.trained, self.stage.optimizer, seed=3)
        return jax.device_put(state, self.stage.state_shardings(self.mesh))


@pytest.fixture(scope="module")
def single() -> Single:
    return Single()


@pytest.fixture(scope="module")
def first(single):
    return single.step(single.state(), single.frozen, single.batch)


def test_only_trained_parameters_have_gradients_and_change(single, first):
    state, metrics = first
    gradients = state.optimizer[0].trace
    assert set(gradients) == set(state.trained) == set(single.trained)
    assert not set(single.trained) & set(single.frozen)
    assert all(np.any(gradient) for gradient in gradients.values())
    changed = [
        p for p, leaf in state.trained.items() if not np.array_equal(leaf, single.trained[p])
    ]
    assert set(changed) == set(single.trained)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-6)


def test_metrics_of_a_step(single, first):
    state, metrics = first
    batch = single.batch
    assert int(metrics["tokens"]) == int((batch.segment_BT > 0).sum())
    assert float(metrics["targets"]) == float(batch.weight_BT.sum())
    assert float(metrics["lr"]) == pytest.approx(1e-2)
    assert metrics["load"].shape == (1, 5, 4)  # MoE layers, modalities, experts
    assert float(metrics["load"].sum()) == 2 * float(metrics["tokens"])
    assert metrics["entropy"].shape == (1,)
    assert 0 < float(metrics["entropy"][0]) <= np.log(4)
    assert int(state.step) == 1
    assert (int(metrics["bad"]), int(state.bad_steps)) == (0, 0)


def test_steps_lower_the_loss(single, first):
    state, metrics = first
    losses = [float(metrics["loss"])]
    for _ in range(5):
        state, metrics = single.step(state, single.frozen, single.batch)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_equal_one_batch(single, first, accumulate: int):
    """Also if they have different numbers of targets."""
    counts = np.asarray(single.batch.weight_BT).reshape(accumulate, -1).sum(axis=1)
    assert len(set(counts)) == accumulate
    step = compiled_step(single.stage, single.mesh, accumulate, shards=2)
    state, metrics = step(single.state(), single.frozen, single.batch)
    expected, all_metrics = first
    for name in ("loss", "grad_norm", "tokens", "targets", "load", "entropy"):
        if name != "entropy":  # it is a mean of means
            np.testing.assert_allclose(metrics[name], all_metrics[name], 1e-5, err_msg=name)
    assert_close(state.optimizer[0].trace, expected.optimizer[0].trace, 1e-5)
    assert_close(state.trained, expected.trained, 1e-5)


@pytest.mark.parametrize("empty", [(2, 3, 6, 7), (3,)])
def test_router_losses_weigh_micro_batches_by_their_tokens(single, empty):
    """A micro-batch without tokens, like the last ones of an epoch may be, counts as nothing.

    Rows 2, 3, 6 and 7 are the second micro-batch.
    """
    rows = np.isin(np.arange(ROWS), empty)[:, None]
    nothing = {"segment_BT": 0, "modality_BT": -1, "weight_BT": 0}
    changed = {n: np.where(rows, v, getattr(single.batch, n)) for n, v in nothing.items()}
    batch = single.batch._replace(
        **{n: a.astype(getattr(single.batch, n).dtype) for n, a in changed.items()}
    )
    losses = RouterLossConfig(balance=0.1 * (len(empty) == 4), router_z=0.1)
    settings = single.stage.settings
    config = settings.config.model_copy(update={"aux": AuxLossConfig(decoder=losses)})
    stage = replace(single.stage, settings=replace(settings, config=config))
    results = []
    for accumulate in (1, 2):
        step = compiled_step(stage, single.mesh, accumulate, shards=2)
        state, metrics = step(single.state(), single.frozen, batch)
        results.append((state.optimizer[0].trace, metrics))
    (gradients, expected), (actual, metrics) = results
    # The balance loss is not a sum over tokens, so it is equal only if a micro-batch is empty.
    names = ["loss", "aux", "router_z", "entropy"] + ["balance"] * (len(empty) == 4)
    for name in names:
        np.testing.assert_allclose(metrics[name], expected[name], 1e-5, err_msg=name)
    assert_close(actual, gradients, 1e-5)


@pytest.mark.parametrize(("unused", "pictures"), [("skip", 4 * (7 + 2 * 7)), ("count", 8 + 2 * 8)])
def test_the_number_of_pictures_that_routers_see(unused: str, pictures: int):
    """One of 8 images and one of 8 videos of two frames is unused; a picture has 4 soft tokens."""
    config, batch = model_config(True), batch_of(True)
    vision = config.vision.model_copy(update={"unused_images": unused})
    config = config.model_copy(update={"vision": vision})
    batch.segment_BT[0], batch.modality_BT[0], batch.slot_BT[0] = 0, -1, -1
    counts = routed(config, batch)
    assert counts["encoder"] == counts["connector"] == pictures
    assert counts["decoder"] == (batch.segment_BT > 0).sum()
    pools = {"image_GIHWC": None, "video_GIFHWC": None, "slot_BT": np.full_like(batch.slot_BT, -1)}
    text = batch._replace(**pools, modality_BT=np.zeros_like(batch.modality_BT))
    assert routed(config, text)["encoder"] == 0


def test_a_non_finite_batch_changes_nothing_and_is_counted(single):
    state, _ = single.step(single.state(), single.frozen, single.batch)
    broken = {**single.frozen, "lm_head/kernel": single.frozen["lm_head/kernel"] * jnp.nan}
    for count in (1, 2):
        after, metrics = single.step(state, broken, single.batch)
        assert (int(metrics["bad"]), int(metrics["bad_steps"])) == (1, count)
        assert int(after.step) == int(state.step) + 1
        for part in ("trained", "optimizer"):
            before = jax.tree.map(np.asarray, getattr(state, part))
            same = jax.tree.map(
                np.array_equal, before, jax.tree.map(np.asarray, getattr(after, part))
            )
            assert jax.tree.all(same), part
        state = after
    state, metrics = single.step(state, single.frozen, single.batch)
    assert (int(metrics["bad"]), int(state.bad_steps)) == (0, 0)
    assert np.isfinite(metrics["loss"])


def test_a_skipped_step_does_not_change_the_logged_learning_rate(single):
    """A skipped step does not advance the schedule, like the rest of the optimizer."""
    state, _ = single.step(single.state(), single.frozen, single.batch)
    expected, rate = single.step(state, single.frozen, single.batch)
    broken = {**single.frozen, "lm_head/kernel": single.frozen["lm_head/kernel"] * jnp.nan}
    skipped, skipped_metrics = single.step(state, broken, single.batch)
    after, after_metrics = single.step(skipped, single.frozen, single.batch)
    assert_close(after.trained, expected.trained, 1e-6)
    assert float(rate["lr"]) < 1e-2
    assert float(skipped_metrics["lr"]) == float(after_metrics["lr"]) == float(rate["lr"])


# ------------------------------------------------------------------------------- meshes


def test_a_mesh_equals_one_device(devices):
    """Compare loss, gradients and the parameters after a step.

    The model has adapter dropout, router losses and media. tests/runs/test_layouts.py runs on all
    meshes with a smaller model.
    """
    mesh = MeshConfig(data=2, fsdp=2, expert=2)
    metrics, gradients, params = one_step(True, devices, mesh)
    single_metrics, single_gradients, single_params = one_step(True, devices[:1], MeshConfig())
    assert_close(metrics, single_metrics, 1e-5)
    # Some gradients are zero up to rounding, like the gradient of a key's bias. Their error is
    # compared with 1 % of the norm of all gradients.
    norm = float(optax.tree.norm(single_gradients))
    assert_close(gradients, single_gradients, 1e-5, floor=0.01 * norm)
    assert_close(params, single_params, 1e-5)


# ------------------------------------------------------------------------------- scoring


def test_scoring_counts_segments(single):
    """A segment counts if it has targets, and it is exact if all of them are predicted."""
    scorer, batch = single.stage.scorer, single.batch
    score = jax.jit(make_score_step(scorer))
    params = {**single.frozen, **single.trained}

    @jax.jit
    def best(params):
        rngs = {"router": jax.random.key(0)}
        return scorer.apply({"params": nest(params)}, batch, rngs=rngs).logits_BTV.argmax(-1)

    target, weight = np.array(best(params)), np.ones((ROWS, LENGTH), np.float32)
    weight[np.asarray(batch.segment_BT) == 0] = 0
    second = LENGTH - 5  # where segment 2 begins
    weight[0, second:] = 0  # row 0: segment 2 has no target
    target[1, 3] += 1  # row 1: a mistake in segment 1
    target[2, second + 1] += 1  # row 2: a mistake at a position without weight
    weight[2, second + 1] = 0
    exact, real = score(params, batch._replace(target_BT=target, weight_BT=weight))
    expected_real = np.zeros((ROWS, LENGTH // 2), bool)
    expected_real[:, :2] = True
    expected_real[0, 1] = False
    expected_exact = expected_real.copy()
    expected_exact[1, 0] = False
    np.testing.assert_array_equal(real, expected_real)
    np.testing.assert_array_equal(exact, expected_exact)


def test_scoring_does_not_depend_on_packing_and_chance():
    """A sample is scored as it would be answered, whatever sample is packed in front of it.

    Scoring draws no second expert at random, and experts have no capacity.
    """
    router = RouterConfig(sample_second=True)
    moe = MOE.model_copy(update={"capacity_factor": 0.2, "router": router})
    run, config = run_config(media=False, dropout=False)
    decoder = run.model.decoder.model_copy(update={"moe": moe})
    run = run.model_copy(update={"model": run.model.model_copy(update={"decoder": decoder})})
    scorer = build(run, config, jax.devices()[:1], MeshConfig()).scorer
    batch, second = batch_of(False), slice(LENGTH - 5, LENGTH - 2)
    token = batch.token_id_BT.copy()
    token[:, : LENGTH - 5] = (token[:, : LENGTH - 5] + 1) % VOCAB
    params = start(False)

    @jax.jit
    def logits(batch: Batch, seed):
        rngs = {"router": jax.random.key(seed)}
        return scorer.apply({"params": nest(params)}, batch, rngs=rngs).logits_BTV

    expected, actual = logits(batch, 0), logits(batch._replace(token_id_BT=token), 1)
    assert_close(actual[:, second], expected[:, second], 1e-5)
    assert np.abs(actual - expected).max() > 0.1
