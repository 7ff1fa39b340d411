"""Cross entropy, exactness, router losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.config import AuxLossConfig
from unimoe_jax.losses import cross_entropy, exact_tokens, router_losses
from unimoe_jax.nn.moe import MoEAux

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.standard_normal((2, 5, 7), np.float32)
TARGET = RNG.integers(0, 7, (2, 5))
WEIGHT = np.array([[1, 0, 1, 1, 0], [0, 0, 0.5, 1, 1]], np.float32)


def test_cross_entropy():
    loss, total = cross_entropy(LOGITS, TARGET, WEIGHT)
    logits = LOGITS.astype(np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(probs, TARGET[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -(WEIGHT * np.log(picked)).sum(), rtol=1e-6)
    assert float(total) == WEIGHT.sum()


def test_cross_entropy_is_float32_and_stable():
    large = jnp.asarray([[[300.0, 0.0, -300.0]]], jnp.bfloat16)
    loss, _ = cross_entropy(large, jnp.array([[1]]), jnp.ones((1, 1)))
    assert loss.dtype == jnp.float32
    assert float(loss) == 300


def test_uncounted_targets_have_no_gradient():
    gradient = jax.grad(lambda x: cross_entropy(x, TARGET, WEIGHT)[0])(LOGITS)
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, WEIGHT > 0)
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


def test_exact_tokens():
    exact = exact_tokens(LOGITS, TARGET, WEIGHT)
    best = LOGITS.argmax(-1)
    np.testing.assert_array_equal(exact, (best == TARGET) | (WEIGHT == 0))
    assert exact_tokens(LOGITS, best, np.ones_like(WEIGHT)).all()
    assert not exact_tokens(LOGITS, (best + 1) % 7, np.ones_like(WEIGHT)).any()


def test_router_losses():
    """The balance term is a sum over layers, the z term a mean; both carry gradient."""

    def total(balance, z):
        none = jnp.zeros(())
        aux = MoEAux(balance, z, none, none, none, none, none)
        return router_losses(aux, AuxLossConfig(balance=0.1, router_z=0.01))

    balance, z = jnp.array([1.0, 2.0, 4.0]), jnp.array([3.0, 6.0, 9.0])
    np.testing.assert_allclose(total(balance, z), 0.1 * 7 + 0.01 * 6, rtol=1e-6)
    by_balance, by_z = jax.grad(total, argnums=(0, 1))(balance, z)
    np.testing.assert_allclose(by_balance, [0.1] * 3, rtol=1e-6)
    np.testing.assert_allclose(by_z, [0.01 / 3] * 3, rtol=1e-6)
    assert float(router_losses(None, AuxLossConfig(balance=1))) == 0
