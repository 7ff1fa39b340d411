"""Cross entropy, sums by modality and their precision, router losses."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tests.reference import cross_entropy
from unimoe_jax.config import AuxLossConfig, RouterLossConfig
from unimoe_jax.nn.moe.layer import MoEAux
from unimoe_jax.nn.moe.router import Routing, balance_loss, router_entropy, router_z_loss, row_mean
from unimoe_jax.stages.losses import modality_sums, router_losses

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


def test_targets_without_weight_have_no_gradient():
    gradient = jax.grad(lambda x: cross_entropy(x, TARGET, WEIGHT)[0])(LOGITS)
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, WEIGHT > 0)
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


def test_every_sample_counts_by_modality():
    """The first row has as many samples as fit, with two positions each.

    The first sample of the second row has two media and counts for both.
    """
    segment = np.array([[1, 1, 2, 2, 3, 3, 4, 4], [1, 1, 1, 2, 2, 0, 0, 0]])
    modality = np.array([[0, 0, 1, 0, 0, 0, 0, 0], [1, 3, 0, 0, 0, -1, -1, -1]])
    # Position n has the value 2 ** n, so every sum shows which positions it has.
    sums = modality_sums(2.0 ** np.arange(16).reshape(2, 8), segment, modality)
    row = [3, 12, 48, 192], [(1 + 2 + 4) * 256, (8 + 16) * 256]
    expected = [row[0][0] + row[0][2] + row[0][3] + row[1][1], row[0][1] + row[1][0], 0, row[1][0]]
    np.testing.assert_array_equal(sums, [*expected, 0])


def test_sums_are_not_rounded_by_products():
    """Every product in a reported sum asks for the highest precision.

    By default, accelerators round the factors of float32 products to eight bits, so that 301
    targets would be counted as 300.
    """
    segment, modality = jnp.ones((2, 8), jnp.int32), jnp.zeros((2, 8), jnp.int32)
    value = jnp.ones((2, 8))
    routing = Routing(modality[0, :, None], value[0, :, None], value.T, value.T, value.T)
    valid = value[0] > 0
    calls = [
        (modality_sums, value, segment, modality),
        (balance_loss, routing, valid),
        (router_z_loss, value.T, valid),
        (router_entropy, routing, valid),
        (lambda w: row_mean(routing, valid[None], w, balance_loss), value[0, :1]),
    ]
    for function, *arguments in calls:
        with jax.default_matmul_precision("default"):  # the other tests run with "highest"
            program = str(jax.make_jaxpr(function)(*arguments))
        assert program.count("dot_general[") == program.count("Precision.HIGHEST") // 2 > 0, program


def aux(balance: jax.Array, z: jax.Array) -> MoEAux:
    """Router statistics with these losses per layer, and zeros otherwise."""
    empty = dict.fromkeys(MoEAux._fields, jnp.zeros(()))
    return MoEAux(**{**empty, "balance": balance, "router_z": z})


def test_router_losses():
    """The balance loss is a mean or a sum over layers, the z-loss a mean; both have gradients.

    With `gradient: none` the value is the same and the gradients are zero.
    """

    def total(balance, z, **changes):
        settings = RouterLossConfig(balance=0.1, router_z=0.01, **changes)
        return router_losses({"decoder": aux(balance, z)}, AuxLossConfig(decoder=settings))

    layers = jnp.array([1.0, 2.0, 4.0]), jnp.array([3.0, 6.0, 9.0])
    np.testing.assert_allclose(total(*layers), 0.1 * 7 / 3 + 0.01 * 6, rtol=1e-6)
    summed = partial(total, balance_layers="sum")
    np.testing.assert_allclose(summed(*layers), 0.1 * 7 + 0.01 * 6, rtol=1e-6)
    by_balance, by_z = jax.grad(summed, argnums=(0, 1))(*layers)
    np.testing.assert_allclose(by_balance, [0.1] * 3, rtol=1e-6)
    np.testing.assert_allclose(by_z, [0.01 / 3] * 3, rtol=1e-6)
    without = partial(total, gradient="none")
    np.testing.assert_allclose(without(*layers), total(*layers))
    for gradient in jax.grad(without, argnums=(0, 1))(*layers):
        np.testing.assert_array_equal(gradient, 0)


def test_router_losses_of_modules():
    """Every module has separate coefficients; a module that did not run adds nothing."""
    ones = jnp.ones(2)
    modules = {
        "encoder": aux(ones, 2 * ones),
        "connector": aux(3 * ones, ones),
        "decoder": aux(ones, ones),
    }
    config = AuxLossConfig(
        encoder=RouterLossConfig(balance=1, router_z=10),
        connector=RouterLossConfig(balance=100),
    )
    assert float(router_losses(modules, config)) == 1 + 20 + 300
    del modules["encoder"]
    assert float(router_losses(modules, config)) == 300
    assert float(router_losses({}, config)) == 0
