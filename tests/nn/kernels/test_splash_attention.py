"""The TPU kernel of jax, interpreted step by step, equals attention in tiles."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import assert_close, relative_error
from tests.nn.attention.attention_cases import placed
from tests.nn.compiled import text_of
from unimoe_jax.config import MeshConfig
from unimoe_jax.models.decoder import causal_mask
from unimoe_jax.nn.attention.attend import attend
from unimoe_jax.nn.attention.packed import attend_packed, tiles_of
from unimoe_jax.nn.kernels.splash_attention import attend_all, attend_segments, suits
from unimoe_jax.parallel.sharding import make_mesh, use_mesh

HEADS, KV_HEADS, SIZE, LENGTH = 4, 2, 128, 200
SAMPLES = ((150, 50), (90, 70))
SCALE = SIZE**-0.5


def packed(rows: int):
    """Return (segment, position) [B,T]; every second row ends with padding."""
    segment, position = np.zeros((2, rows, LENGTH), np.int32)
    for row in range(rows):
        lengths = SAMPLES[row % 2]
        segment[row, : sum(lengths)] = np.repeat([1, 2], lengths)
        position[row, : sum(lengths)] = np.concatenate([np.arange(n) for n in lengths])
    return jnp.asarray(segment), jnp.asarray(position)


def tensors(rows: int, dtype=jnp.float32):
    """Return random queries, keys, values and gradients of the output."""
    random = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    shapes = [(rows, LENGTH, n, SIZE) for n in heads]
    return [jnp.asarray(random.standard_normal(s, np.float32), dtype) for s in shapes]


def with_gradients(attend, q, k, v, g, segment_BT):
    """Return the output and gradients of positions in use, with zeros at all others.

    The output of the others must be finite, or 0 · output would be NaN.
    """
    out, pull = jax.vjp(attend, q, k, v)
    keep = (segment_BT > 0)[:, :, None, None]
    return (jnp.where(keep, out, 0 * out), *pull(jnp.where(keep, g, 0)))


@jax.jit
def in_tiles(q, k, v, g, segment_BT, position_BT):
    tiles = tiles_of(causal_mask(segment_BT, position_BT), segment_BT > 0)
    return with_gradients(partial(attend_packed, tiles=tiles, scale=SCALE), q, k, v, g, segment_BT)


@jax.jit
def kernel(q, k, v, g, segment_BT):
    attend = partial(attend_segments, segment_BT=segment_BT, scale=SCALE, interpret=True)
    return with_gradients(attend, q, k, v, g, segment_BT)


@pytest.fixture(scope="module")
def expected():
    q, k, v, g = tensors(2)
    return in_tiles(q, k, v, g, *packed(2))


def test_equals_tiles(expected):
    """Outputs and all gradients agree, with grouped heads, for a row that is no multiple of 128."""
    assert_close(kernel(*tensors(2), packed(2)[0]), expected, 1e-5)


def test_low_precision(expected):
    out, *gradients = kernel(*tensors(2, jnp.bfloat16), packed(2)[0])
    assert out.dtype == jnp.bfloat16
    for actual, wanted in zip((out, *gradients), expected, strict=True):
        assert relative_error(actual.astype(jnp.float32), wanted) < 2e-2


def test_a_mesh_changes_nothing(devices):
    """Rows are cut over four devices and heads over two, and nothing is exchanged."""
    arguments = (*tensors(4), packed(4)[0])
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2), devices)
    with use_mesh(mesh):
        on_mesh = placed(mesh, arguments)
        program = kernel.lower(*on_mesh).compile()
    q, k, v, g = tensors(4)
    assert_close(program(*on_mesh), in_tiles(q, k, v, g, *packed(4)), 1e-5)
    exchanges = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not any(op in text_of(program) for op in exchanges)


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (20, 300)])
def test_all_keys(queries, keys):
    """Check attention without a mask as in encoders, and with few queries as in query connectors.

    Heads have any size, and rows are padded to tiles.
    """
    random, heads = np.random.default_rng(1), 2
    lengths = (queries, keys, keys, queries)
    q, k, v, g = (
        jnp.asarray(random.standard_normal((2, t, heads, 24), np.float32)) for t in lengths
    )

    @partial(jax.jit, static_argnums=0)
    def outcome(attend, q, k, v, g):
        out, pull = jax.vjp(partial(attend, scale=0.2), q, k, v)
        return out, *pull(g)

    expected = outcome(attend, q, k, v, g)
    assert_close(outcome(partial(attend_all, interpret=True), q, k, v, g), expected, 1e-5)


def test_what_a_mesh_does_not_divide_stays_whole(devices):
    """One row cannot be cut over two data shards, nor three heads over four devices."""
    random = np.random.default_rng(2)
    q, k, v = (jnp.asarray(random.standard_normal((1, 40, 3, 24), np.float32)) for _ in range(3))
    with use_mesh(make_mesh(MeshConfig(data=2, tensor=4), devices)):
        whole = jax.jit(partial(attend_all, scale=0.2, interpret=True))(q, k, v)
    assert_close(whole, attend(q, k, v, scale=0.2), 1e-5)


def test_queries_stay_with_their_keys(devices):
    """If a rule cuts query heads but not key heads, every query head still reads its key head."""
    segment_BT, position_BT = packed(2)
    q, k, v, g = tensors(2)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices[:4])
    with use_mesh(mesh, {"kv_heads": None}):
        cut = kernel(q, k, v, g, segment_BT)
    assert_close(cut, in_tiles(q, k, v, g, segment_BT, position_BT), 1e-5)


def test_where_it_is_used(monkeypatch):
    """The kernel is used on TPUs, unless the setting forbids it or there are few positions."""
    assert not suits("auto", "causal", 2048)
    monkeypatch.setattr("unimoe_jax.nn.kernels.splash_attention.current_platform", lambda: "tpu")
    assert suits("auto", "causal", 2048)
    assert suits("auto", "all", 1500)
    assert not suits("auto", "causal", 128)
    assert not suits("auto", "all", 577)
    assert not suits("xla", "causal", 2048)
