"""Routing decisions and router statistics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.config import RouterConfig
from unimoe_jax.config.media import NUM_MODALITIES
from unimoe_jax.nn.moe.layer import _statistics
from unimoe_jax.nn.moe.router import balance_loss, expert_load, route, router_entropy, router_z_loss

TOKENS, EXPERTS, TOP_K = 40, 4, 2
ORDERS = ("topk_softmax", "softmax_topk", "softmax_cast_topk")
VALID = jnp.ones(TOKENS, bool)


@pytest.fixture
def logits() -> jax.Array:
    return 2 * jax.random.normal(jax.random.key(0), (TOKENS, EXPERTS))


def routed(
    logits,
    order: Any = "topk_softmax",
    dtype: Any = jnp.float32,
    valid=VALID,
    top_k=TOP_K,
    noise=None,
):
    """Route with default arguments."""
    return route(logits, top_k, RouterConfig(dtype_order=order), dtype, valid, noise)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_orders_agree_in_float32(logits, order: str, top_k: int):
    """All orders compute: softmax, keep the top k, renormalise."""
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ranks = np.argsort(-np.asarray(logits), axis=1)[:, :top_k]
    chosen = np.take_along_axis(probs, ranks, axis=1)
    routing = routed(logits, order, top_k=top_k)
    np.testing.assert_array_equal(routing.expert_XK, ranks)
    np.testing.assert_allclose(routing.weight_XK, chosen / chosen.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(routing.probs_XE, probs, rtol=1e-5)
    assert routing.expert_XK.dtype == jnp.int32
    assert routing.weight_XK.dtype == jnp.float32


def test_orders_round_in_different_places(logits):
    """Uni-MoE and Mixtral round the weights once; CuMo rounds the probabilities before that."""
    low = {order: routed(logits, order, jnp.bfloat16) for order in ORDERS}
    exact = routed(logits).weight_XK
    rounded = exact.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(low["topk_softmax"].weight_XK, rounded)
    np.testing.assert_allclose(low["softmax_topk"].weight_XK, rounded, rtol=2**-8)
    probs = jax.nn.softmax(logits, axis=-1).astype(jnp.bfloat16)
    chosen, _ = jax.lax.top_k(probs, TOP_K)
    expected = (chosen / chosen.sum(-1, keepdims=True)).astype(jnp.float32)
    np.testing.assert_array_equal(low["softmax_cast_topk"].weight_XK, expected)
    assert not np.array_equal(expected, low["softmax_topk"].weight_XK)


@pytest.mark.parametrize("noisy", [False, True])
def test_invalid_tokens_go_nowhere(logits, noisy: bool):
    valid = jnp.arange(TOKENS) % 3 != 0
    noise = jax.random.gumbel(jax.random.key(1), logits.shape) if noisy else None
    routing = routed(logits, valid=valid, noise=noise)
    assert (routing.expert_XK[~valid] == EXPERTS).all()
    assert (routing.weight_XK[~valid] == 0).all()
    assert (routing.expert_XK[valid] < EXPERTS).all()
    np.testing.assert_allclose(routing.weight_XK[valid].sum(1), 1, rtol=1e-6)


def test_second_expert_is_drawn():
    """The first expert is the best; the second follows the distribution without noise and without
    the first.
    """
    draws = 20_000
    logits = jnp.broadcast_to(jnp.array([0.5, 1.5, -0.5, 0.0]), (draws, EXPERTS))
    noise = jax.random.gumbel(jax.random.key(3), logits.shape)
    routing = routed(logits, valid=jnp.ones(draws, bool), noise=noise)
    assert (routing.expert_XK[:, 0] == 1).all()
    counts = np.bincount(routing.expert_XK[:, 1], minlength=EXPERTS)
    assert counts[1] == 0
    probs = np.asarray(routing.probs_XE[0])
    rest = np.where(np.arange(EXPERTS) == 1, 0, probs)
    expected = draws * rest / rest.sum()
    chi_square = sum((counts[e] - expected[e]) ** 2 / expected[e] for e in (0, 2, 3))
    assert chi_square < 13.8  # two degrees of freedom: exceeded once in a thousand
    weights = np.asarray(routing.weight_XK)
    for second in (0, 2, 3):
        pair = np.array([probs[1], probs[second]])
        rows = weights[routing.expert_XK[:, 1] == second]
        np.testing.assert_allclose(rows, np.tile(pair / pair.sum(), (len(rows), 1)), rtol=1e-5)
    np.testing.assert_allclose(routing.logits_XE, logits + noise)


# ------------------------------------------------------------------------ statistics


def test_balance_loss_of_uniform_and_collapsed_routers():
    logits = 1e-4 * jnp.eye(EXPERTS)[jnp.arange(TOKENS) % EXPERTS]
    assert float(balance_loss(routed(logits), VALID)) == pytest.approx(1, abs=1e-6)
    collapsed = jnp.tile(jnp.array([[50.0, 0, 0, 0]]), (TOKENS, 1))
    assert float(balance_loss(routed(collapsed), VALID)) == pytest.approx(EXPERTS)


def test_balance_loss_counts_valid_tokens_only(logits):
    valid = jnp.arange(TOKENS) < 25
    part = routed(logits[:25], valid=jnp.ones(25, bool))
    changed = logits.at[25:].set(7.0)
    for function in (balance_loss, router_entropy):
        expected = function(part, jnp.ones(25, bool))
        np.testing.assert_allclose(function(routed(changed, valid=valid), valid), expected, 1e-6)


def test_balance_gradient_flows_through_probabilities_alone(logits):
    logits = logits + jnp.array([[1.0, 0, 0, -1]])  # far from balanced
    gradient = jax.grad(lambda x: balance_loss(routed(x), VALID))(logits)
    first = np.eye(EXPERTS)[np.argmax(logits, axis=1)]
    share = first.mean(axis=0)
    expected = jax.grad(
        lambda x: EXPERTS * jnp.sum(jax.nn.softmax(x).mean(axis=0) * jnp.asarray(share))
    )(logits)
    assert np.abs(gradient).max() > 1e-4
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


def test_z_loss_and_entropy(logits):
    valid = jnp.arange(TOKENS) % 4 != 1
    kept = np.asarray(logits, np.float64)[np.asarray(valid)]
    log_z = np.log(np.exp(kept).sum(1))
    np.testing.assert_allclose(router_z_loss(logits, valid), np.mean(log_z**2), rtol=1e-6)
    probs = np.exp(kept - log_z[:, None])
    expected = -(probs * np.log(probs)).sum(1).mean()
    np.testing.assert_allclose(router_entropy(routed(logits), valid), expected, rtol=1e-6)
    assert float(router_z_loss(logits, jnp.zeros(TOKENS, bool))) == 0


def test_the_z_loss_uses_logits_without_noise(logits):
    """The router does not produce the noise that draws the second expert."""
    noise = jax.random.gumbel(jax.random.key(1), logits.shape)
    valid_BT, modality_BT = VALID[None], jnp.zeros((1, TOKENS), jnp.int32)
    z = [
        float(_statistics(routed(logits, noise=n), modality_BT, valid_BT, None).router_z)
        for n in (None, noise)
    ]
    assert z[0] == z[1] == pytest.approx(float(router_z_loss(logits, VALID)))


def test_load_per_modality_and_expert(logits):
    modality = np.random.default_rng(0).integers(-1, NUM_MODALITIES, TOKENS)
    routing = routed(logits, valid=jnp.asarray(modality >= 0))
    expected = np.zeros((NUM_MODALITIES, EXPERTS))
    for token, kind in enumerate(modality):
        if kind >= 0:
            for expert in routing.expert_XK[token]:
                expected[kind, expert] += 1
    np.testing.assert_array_equal(expert_load(routing, jnp.asarray(modality)), expected)
    assert expected.sum() == TOP_K * (modality >= 0).sum()
