"""Experts held as separate arrays equal the dense reference, for few tokens and for many."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import relative_error
from unimoe_jax.nn.moe import decode
from unimoe_jax.nn.moe.decode import BLOCK, FEW, Expert
from unimoe_jax.nn.moe.dispatch import moe_ffn
from unimoe_jax.nn.moe.experts import SwiGLUExpert

EXPERTS, WIDTH, HIDDEN = 3, 6, 10


def weights():
    """Return the kernels of all experts, stacked."""
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal((EXPERTS, *shape), np.float32)
        for name, shape in (
            ("gate_proj", (WIDTH, HIDDEN)),
            ("up_proj", (WIDTH, HIDDEN)),
            ("down_proj", (HIDDEN, WIDTH)),
        )
    }


def separate(stacked) -> list[Expert]:
    """Return every expert with arrays that belong to it alone, [out, in]."""

    def kernel(name: str, number: int) -> jax.Array:
        return jnp.asarray(stacked[name][number].T)

    return [
        Expert(
            gate=kernel("gate_proj", number),
            up=kernel("up_proj", number),
            down=kernel("down_proj", number),
        )
        for number in range(EXPERTS)
    ]


def routed(tokens: int, last: int) -> tuple[Any, Any, Any]:
    """Return tokens [X,D], choices among the experts 0 to `last`, and their weights, as numpy.

    A choice of 3 means "no expert".
    """
    random = np.random.default_rng(tokens)
    expert = random.permuted(np.tile(np.arange(EXPERTS + 1), (tokens, 1)), axis=1)[:, :2]
    expert = np.where(expert > last, EXPERTS, expert).astype(np.int32)
    weight = np.where(expert < EXPERTS, random.random(expert.shape), 0).astype(np.float32)
    return random.standard_normal((tokens, WIDTH), np.float32), expert, weight


@pytest.mark.parametrize("tokens", [1, 5, 8, 16, FEW, FEW + 1, 2 * BLOCK + 9])
@pytest.mark.parametrize("last", [0, 2])
def test_equals_the_dense_reference(tokens: int, last: int):
    """If `last` is 0, two of the experts have no tokens, and one has most of them."""
    x, expert, weight = routed(tokens, last)
    stacked = weights()
    y_DX = jax.jit(decode.apply)(separate(stacked), x.T, expert, weight)
    kernels = {name: {"kernel": w} for name, w in stacked.items()}
    expected = moe_ffn(
        SwiGLUExpert(jnp.float32),
        kernels,
        x[None],
        expert[None],
        weight[None],
        jnp.uint32(0),
        "dense",
    )[0]
    assert relative_error(y_DX.T, expected) < 1e-5


def test_unchosen_experts_are_not_read():
    """NaN in the weights of experts that no token chose does not reach the result."""
    x, expert, weight = routed(6, 0)
    experts = separate(weights())
    expected = decode.apply(experts, x.T, expert, weight)
    broken = [experts[0], *(jax.tree.map(lambda w: w * np.nan, e) for e in experts[1:])]
    np.testing.assert_array_equal(decode.apply(broken, x.T, expert, weight), expected)


def test_bfloat16_products_run():
    """XLA's CPU backend lacks some forms of bfloat16 products; it has those in use here."""
    for tokens in (1, 20, FEW + 1):
        x, expert, weight = routed(tokens, 2)
        experts = separate(weights())
        half = [jax.tree.map(lambda w: w.astype(jnp.bfloat16), e) for e in experts]
        y = jax.jit(decode.apply)(half, jnp.asarray(x.T, jnp.bfloat16), expert, weight)
        expected = decode.apply(experts, x.T, expert, weight)
        assert relative_error(y.astype(jnp.float32), expected) < 0.05
