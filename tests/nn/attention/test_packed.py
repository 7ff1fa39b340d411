"""Attention in tiles equals attention over the whole mask, and reads only tiles that are seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import assert_close, relative_error
from tests.nn.attention.attention_cases import placed
from tests.nn.compiled import text_of
from unimoe_jax.config import MeshConfig
from unimoe_jax.models.decoder import causal_mask
from unimoe_jax.nn.attention import packed as packed_attention
from unimoe_jax.nn.attention.attend import attend
from unimoe_jax.nn.attention.packed import attend_packed, tiles_of
from unimoe_jax.parallel.sharding import make_mesh, use_mesh

HEADS, KV_HEADS, SIZE = 4, 2, 3
TILE = 4
# Lengths of the samples in two rows. The rest of a row of LENGTH positions is padding.
LENGTH = 13
ROWS = {
    "one sample": ((13,), (13,)),
    "samples end with tiles": ((4, 4, 4, 1), (8, 4, 1)),
    "samples cross tiles": ((3, 6, 4), (5, 2, 5, 1)),
    "padding in the last tiles": ((3, 2), (6, 3)),
    "a row of padding": ((4, 4, 5), ()),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(packed_attention, "TILE", TILE)


def packed(samples, length: int):
    """Return (mask [B,T,T], valid [B,T]) of rows that hold samples of these lengths."""
    segment, position = np.zeros((2, len(samples), length), np.int32)
    for row, lengths in enumerate(samples):
        used = sum(lengths)
        segment[row, :used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        position[row, :used] = np.concatenate([np.arange(n) for n in lengths] or [[]])
    return causal_mask(jnp.asarray(segment), jnp.asarray(position)), jnp.asarray(segment > 0)


def tensors(length: int, rows: int = 2):
    rng = np.random.default_rng(length)
    q, g = rng.standard_normal((2, rows, length, HEADS, SIZE), np.float32)
    k, v = rng.standard_normal((2, rows, length, KV_HEADS, SIZE), np.float32)
    return tuple(jnp.asarray(x) for x in (q, k, v, g))


@jax.jit
def whole(q, k, v, g, mask, valid):
    """Return outputs and gradients of valid positions, computed over all keys."""
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, scale=0.7, mask_BTS=mask), q, k, v)
    keep = valid[:, :, None, None]
    return jnp.where(keep, out, 0), *pull(jnp.where(keep, g, 0))


@jax.jit
def in_tiles(q, k, v, g, mask, valid):
    """Return outputs and gradients of valid positions, computed in tiles."""
    tiles = tiles_of(mask, valid)
    out, pull = jax.vjp(lambda q, k, v: attend_packed(q, k, v, tiles, scale=0.7), q, k, v)
    keep = valid[:, :, None, None]
    return jnp.where(keep, out, 0), *pull(jnp.where(keep, g, 0))


@pytest.mark.parametrize("rows", ROWS)
def test_tiles_equal_the_whole(rows: str):
    """Outputs and all gradients agree, although the rows are no multiple of a tile.

    The outputs of padding are finite.
    """
    mask, valid = packed(ROWS[rows], LENGTH)
    q, k, v, g = tensors(LENGTH)
    assert_close(in_tiles(q, k, v, g, mask, valid), whole(q, k, v, g, mask, valid), 1e-6)
    assert np.isfinite(attend_packed(q, k, v, tiles_of(mask, valid), scale=0.7)).all()


@pytest.mark.parametrize("length", [3, 4, 5, 64 + 1])
def test_any_length(length: int):
    """Check less than one tile, one, two, and 9 tiles of 8, because 17 tiles of 4 are too many."""
    mask, valid = packed(((length // 2, length - length // 2), (length - 1,)), length)
    assert len(tiles_of(mask, valid).first_C) == {3: 1, 4: 1, 5: 2, 65: 9}[length]
    arguments = (*tensors(length), mask, valid)
    assert_close(in_tiles(*arguments), whole(*arguments), 1e-6)


def test_a_tile_is_visited_if_any_row_sees_it():
    tiles = tiles_of(*packed(((4, 4, 5), (3, 6)), LENGTH))
    np.testing.assert_array_equal(tiles.first_C, [0, 0, 0, 2])
    np.testing.assert_array_equal(tiles.stop_C, [1, 2, 3, 4])
    # Padding needs no output, so its tiles visit only the key tiles at their own places.
    tiles = tiles_of(*packed(((4, 4), ()), LENGTH))
    np.testing.assert_array_equal(tiles.first_C, [0, 1, 2, 3])


def test_tiles_that_are_not_seen_are_not_read():
    """Keys and values of the first sample are NaN, which would reach every product that reads them.

    The samples after it have the right outputs and gradients nevertheless.
    """
    mask, valid = packed(((8, 5), (4, 4, 5)), LENGTH)
    q, k, v, g = tensors(LENGTH)
    expected = whole(q, k, v, g, mask, valid)
    bad_k, bad_v = (x.at[:, :8].set(jnp.nan) for x in (k, v))
    tiles = tiles_of(mask, valid)
    out, pull = jax.vjp(lambda q, k, v: attend_packed(q, k, v, tiles, scale=0.7), q, bad_k, bad_v)
    gradients = pull(g)
    assert np.isnan(out[:, :8]).all()
    for actual, wanted in zip((out, *gradients), expected, strict=True):
        assert relative_error(actual[:, 8:], wanted[:, 8:]) < 1e-6


def test_low_precision():
    mask, valid = packed(ROWS["samples cross tiles"], LENGTH)
    q, k, v, g = tensors(LENGTH)
    low_q, low_k, low_v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    low = attend_packed(low_q, low_k, low_v, tiles_of(mask, valid), scale=0.7)
    assert low.dtype == jnp.bfloat16
    assert relative_error(low[valid], whole(q, k, v, g, mask, valid)[0][valid]) < 2e-2


def test_a_mesh_changes_nothing(devices):
    """Rows are cut over four devices and heads over two, and nothing is gathered."""
    samples = ROWS["samples cross tiles"] + ROWS["padding in the last tiles"]
    arguments = (*tensors(LENGTH, rows=4), *packed(samples, LENGTH))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    with use_mesh(mesh):
        on_mesh = placed(mesh, arguments)
        program = in_tiles.lower(*on_mesh).compile()
    assert_close(program(*on_mesh), whole(*arguments), 1e-6)
    text = text_of(program)
    assert "all-reduce" in text
    assert not any(op in text for op in ("all-gather", "all-to-all", "collective-permute"))
