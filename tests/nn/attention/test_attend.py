"""Attention equals numpy, in chunks, with masks and biases; rotary positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import assert_close, relative_error
from unimoe_jax.nn.attention import attend as attend_module
from unimoe_jax.nn.attention.attend import attend
from unimoe_jax.nn.attention.rope import apply_rope, rope_tables

HEADS, KV_HEADS, SIZE = 4, 2, 3


def tensors(length: int, keys: int, batch: int = 2) -> tuple[Any, Any, Any]:
    """Return random queries, keys and values as numpy arrays."""
    rng = np.random.default_rng(length)
    q = rng.standard_normal((batch, length, HEADS, SIZE), np.float32)
    k, v = rng.standard_normal((2, batch, keys, KV_HEADS, SIZE), np.float32)
    return q, k, v


def reference(q, k, v, scale, mask=None, bias=None):
    """Compute attention head by head in float64; query head n reads key head n // (N/K)."""
    out = np.zeros(q.shape)
    for b, n in np.ndindex(q.shape[0], HEADS):
        scores = scale * q[b, :, n].astype(np.float64) @ k[b, :, n // (HEADS // KV_HEADS)].T
        if bias is not None:
            scores = scores + bias[b % len(bias), n]
        if mask is not None:
            scores = np.where(mask[b % len(mask)], scores, -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[b, :, n] = weights @ v[b, :, n // (HEADS // KV_HEADS)]
    return out


@pytest.mark.parametrize("length", [7, 8, 9, 11, 12, 13])
def test_chunks_equal_the_whole(monkeypatch, length: int):
    """Check lengths around multiples of a chunk of 4."""
    monkeypatch.setattr(attend_module, "QUERY_CHUNK", 4)
    q, k, v = tensors(length, length)
    rng = np.random.default_rng(0)
    mask: Any = rng.random((2, length, length)) < 0.6
    bias: Any = rng.standard_normal((2, HEADS, length, length), np.float32)
    out = attend(q, k, v, scale=0.7, mask_BTS=mask, bias_BNTS=bias)
    assert relative_error(out, reference(q, k, v, 0.7, mask, bias)) < 1e-6


def test_chunks_have_the_same_gradients(monkeypatch):
    q, k, v = tensors(13, 6)
    mask = np.random.default_rng(0).random((1, 13, 6)) < 0.7

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, scale=0.7, mask_BTS=jnp.asarray(mask))))

    gradients = jax.grad(loss, argnums=(0, 1, 2))
    whole = gradients(q, k, v)
    monkeypatch.setattr(attend_module, "QUERY_CHUNK", 4)
    assert_close(gradients(q, k, v), whole, 1e-6)


@pytest.mark.parametrize("shape", [(2, HEADS, 9, 5), (1, HEADS, 1, 5), (2, HEADS, 9, 1)])
def test_gradient_of_a_shared_bias(monkeypatch, shape):
    """The gradient equals finite differences along a random direction, in chunks."""
    monkeypatch.setattr(attend_module, "QUERY_CHUNK", 4)
    q, k, v = tensors(9, 5)
    rng = np.random.default_rng(2)
    bias, direction = rng.standard_normal((2, *shape), np.float32)

    def value(bias):
        return float(np.sum(np.sin(reference(q, k, v, 0.7, bias=np.broadcast_to(bias, full)))))

    def loss(bias):
        return jnp.sum(jnp.sin(attend(q, k, v, scale=0.7, bias_BNTS=bias)))

    full = (2, HEADS, 9, 5)
    step = 1e-3
    differences = (value(bias + step * direction) - value(bias - step * direction)) / (2 * step)
    assert abs(float(jnp.sum(jax.grad(loss)(bias) * direction)) - differences) < 1e-4


@pytest.mark.parametrize(
    ("mask_shape", "bias_shape"), [((1, 1, 5), (1, 4, 1, 5)), ((2, 1, 5), None)]
)
def test_masks_and_biases_shared_by_queries(monkeypatch, mask_shape, bias_shape):
    monkeypatch.setattr(attend_module, "QUERY_CHUNK", 4)
    q, k, v = tensors(11, 5)
    rng = np.random.default_rng(1)
    mask: Any = rng.random(mask_shape) < 0.6
    bias: Any = None if bias_shape is None else rng.standard_normal(bias_shape, np.float32)
    out = attend(q, k, v, scale=1.0, mask_BTS=mask, bias_BNTS=bias)
    assert relative_error(out, reference(q, k, v, 1.0, mask, bias)) < 1e-6


def test_rows_without_a_visible_key_are_finite():
    """Such rows average the values, and their gradients are finite too."""
    q, k, v = tensors(3, 5)
    mask = jnp.ones((2, 3, 5), bool).at[:, 1].set(False)

    def attended(q):
        return attend(q, k, v, scale=1.0, mask_BTS=mask)

    out, pull = jax.vjp(attended, q)
    mean = np.repeat(v.mean(axis=1), HEADS // KV_HEADS, axis=1)
    np.testing.assert_allclose(out[:, 1], mean, rtol=1e-5)
    (gradient,) = pull(jnp.ones_like(out))
    assert np.isfinite(gradient).all()


def test_low_precision():
    q, k, v = tensors(6, 6)
    low = attend(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)), scale=0.5)
    assert low.dtype == jnp.bfloat16
    assert relative_error(low, reference(q, k, v, 0.5)) < 2e-2


# ------------------------------------------------------------------------- rotary positions


def test_rotation_is_relative_and_keeps_length():
    x, y = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8), np.float32))

    def product(first: int, second: int) -> float:
        a = apply_rope(x, *rope_tables(jnp.array([[first]]), 8, 100.0))
        b = apply_rope(y, *rope_tables(jnp.array([[second]]), 8, 100.0))
        np.testing.assert_allclose(jnp.linalg.norm(a), np.linalg.norm(x), rtol=1e-6)
        return float(jnp.sum(a * b))

    assert product(5, 2) == pytest.approx(product(13, 10), rel=1e-5)
    assert product(5, 2) != pytest.approx(product(5, 3), rel=1e-3)


def test_rotation_pairs_halves():
    """At position 1, dimension i is rotated together with i + H/2, by the angle theta^(−2i/H)."""
    tables = rope_tables(jnp.array([[1]]), 4, 100.0)
    for dim, angle in ((0, 1.0), (1, 100 ** (-2 / 4))):
        x = jnp.zeros((1, 1, 1, 4)).at[..., dim].set(1)
        expected = np.zeros(4)
        expected[dim], expected[dim + 2] = np.cos(angle), np.sin(angle)
        np.testing.assert_allclose(apply_rope(x, *tables)[0, 0, 0], expected, atol=1e-6)


def test_tables_can_be_rounded():
    exact = rope_tables(jnp.arange(9)[None], 8, 1e4)
    rounded = rope_tables(jnp.arange(9)[None], 8, 1e4, "float16")
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(a).astype(np.float16), b)
        assert not np.array_equal(a, b)
