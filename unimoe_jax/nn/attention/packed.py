"""Softmax attention over packed rows in tiles; tiles of keys that no query sees are skipped.

A packed row holds several samples, and a query sees the keys of its sample that are not later than
itself. Queries and keys are cut into tiles. A tile of queries visits a span of key tiles: from the
first to the last that any of its queries sees in any row of the batch. The spans are data, so one
compiled program serves all batches. The contributions of key tiles are added up by the running
softmax of arXiv 2205.14135, section 3.1, and the backward pass keeps only its statistics. Scores
are transposed as in `attend.py`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from unimoe_jax.nn.attention.attend import masked_scores, over_heads, product, times_queries

TILE = 64
"""Positions per tile, or a multiple of this number where there would be too many tiles."""
MAX_TILES = 16


class Tiles(NamedTuple):
    """The visible tiles of a batch, the same for all layers.

    There are C tiles of t query positions and J = C tiles of S = t key positions.

    visible_CJBST: bool, True where the key is visible; B may be 1.
    first_C, stop_C: int32, the span of key tiles that each tile of queries visits.
    """

    visible_CJBST: jax.Array
    first_C: jax.Array
    stop_C: jax.Array


def tiles_of(mask_BTS: jax.Array, valid_BT: jax.Array) -> Tiles:
    """Return the tiles of a mask over packed rows.

    Example: a row holds samples of 2 and 3 tokens, and tiles have 2 positions. Tile 0 holds the
    first sample and sees only itself. Tile 1 holds the positions 2 and 3 of the second sample and
    sees only itself, and tile 2 holds position 4 and sees the tiles 1 and 2. Hence first_C is
    (0, 1, 1) and stop_C is (1, 2, 3).

    Args:
        mask_BTS: bool, True where query t sees key s; T = S.
        valid_BT: bool, False for queries whose output is not used and only has to be finite. These
            are the positions that fill up a row. They see each other, however far apart they are,
            and would make the spans longer.
    """
    length = mask_BTS.shape[1]
    size = TILE * -(-length // (TILE * MAX_TILES))
    count = -(-length // size)
    padding = (0, count * size - length)
    mask_BTS = jnp.pad(mask_BTS, ((0, 0), padding, padding))
    valid_BT1 = jnp.pad(valid_BT, ((0, 0), padding))[:, :, None]
    split = partial(rearrange, pattern="b (c t) (j s) -> c j b s t", t=size, s=size)
    # Every tile of queries visits the key tile at its own place, so that every sum of weights is
    # positive.
    seen_CJ = split(mask_BTS & valid_BT1).any((2, 3, 4)) | jnp.eye(count, dtype=bool)
    first_C = jnp.argmax(seen_CJ, axis=1).astype(jnp.int32)
    stop_C = count - jnp.argmax(seen_CJ[:, ::-1], axis=1).astype(jnp.int32)
    return Tiles(split(mask_BTS), first_C, stop_C)


def attend_packed(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, tiles: Tiles, *, scale: float
) -> jax.Array:
    """Return softmax(scale · q kᵀ, masked) v, with N query heads over K key heads (K divides N).

    Scores and softmax are float32 (arXiv 1706.03762, eq. 1).

    Returns:
        [B,T,N,H] in the dtype of q.
    """
    return _attend(scale, q_BTNH, k_BTKH, v_BTKH, tiles)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, tiles) -> jax.Array:
    """Compute `attend_packed` with a gradient that visits the same tiles as the forward pass.

    Example of the running softmax: one query over two key tiles of one key each, with the scores
    (ln 3, 0) and the values (4, 8). After the first tile the output is 4, the maximum is ln 3 and
    the sum is 1. The second tile has the weight exp(0 − ln 3) = 1/3, which gives the output
    4 + 8/3 = 20/3 and the sum 4/3. The result is their quotient 5, and the backward pass keeps the
    maximum ln 3 and the sum 4/3. `attend._attend` continues this example with the gradients.
    """
    return _forward(scale, q, k, v, tiles)[0]


def _forward(scale, q, k, v, tiles):
    """Return the output, and the statistics (maximum, sum) of all tiles, each [C,B,K,1,G,t]."""
    k_JBKSH, v_JBKHS = _key_tiles(k, tiles), jnp.swapaxes(_key_tiles(v, tiles), 3, 4)

    def query_tile(_, inputs):
        """Attend from one tile of queries; the scan goes over all of them."""
        q_BKHGT, (visible_JBST, first, stop) = inputs

        def add_key_tile(j, carry):
            out, top, total = carry
            scores = masked_scores(scale, q_BKHGT, k_JBKSH[j], visible_JBST[j])
            higher = jnp.maximum(top, jnp.max(scores, axis=2, keepdims=True))
            # Earlier sums used the old maximum; `shrink` rescales them to the new one.
            shrink, weights = jnp.exp(top - higher), jnp.exp(scores - higher)
            out = shrink * out + product(v_JBKHS[j], weights.astype(v.dtype))
            return out, higher, shrink * total + jnp.sum(weights, axis=2, keepdims=True)

        out = jnp.zeros(q_BKHGT.shape, jnp.float32)
        zero = jnp.zeros_like(out[:, :, :1])
        start = (out, zero - jnp.inf, zero)
        out, top, total = _visit(first, stop, tiles, add_key_tile, start)
        return None, ((out / total).astype(q.dtype), top, total)

    inputs = (_query_tiles(q, k, tiles), tiles)
    _, (out_CBKHGT, top, total) = jax.lax.scan(query_tile, None, inputs)
    return _from_query_tiles(out_CBKHGT, q), (top, total)


def _attend_fwd(scale, q, k, v, tiles):
    out, statistics = _forward(scale, q, k, v, tiles)
    return out, (q, k, v, tiles, out, statistics)


def _attend_bwd(scale, residuals, g):
    q, k, v, tiles, out, statistics = residuals
    k_JBKSH, v_JBKSH = _key_tiles(k, tiles), _key_tiles(v, tiles)
    q_CBKHGT = _query_tiles(q, k, tiles)
    g_CBKHGT = _query_tiles(g.astype(q.dtype), k, tiles)
    out_CBKHGT = _query_tiles(out, k, tiles)
    # The softmax needs Σ_s weights · dweights for every query. It equals the product of the output
    # with its gradient, which needs no sum over keys.
    inner = g_CBKHGT.astype(jnp.float32) * out_CBKHGT.astype(jnp.float32)
    inner_CBK1GT = jnp.sum(inner, axis=3, keepdims=True)

    def query_tile(carry, inputs):
        """Add the gradients from one tile of queries to (dk, dv), and return its dq."""
        dk, dv = carry
        q_BKHGT, g_BKHGT, inner_BK1GT, (visible_JBST, first, stop), (top, total) = inputs

        def add_key_tile(j, carry):
            dq, dk, dv = carry
            visible = visible_JBST[j]
            # Compute the weights of this pair of tiles again, from its scores and statistics.
            scores = masked_scores(scale, q_BKHGT, k_JBKSH[j], visible)
            weights = jnp.exp(scores - top) * (1 / total)
            dscores = weights * (product(v_JBKSH[j], g_BKHGT) - inner_BK1GT)
            dscores = jnp.where(over_heads(visible), scale * dscores, 0.0).astype(q.dtype)
            dq += product(jnp.swapaxes(k_JBKSH[j], 2, 3), dscores)
            dk = dk.at[j].add(times_queries(dscores, q_BKHGT))
            dv = dv.at[j].add(times_queries(weights.astype(v.dtype), g_BKHGT))
            return dq, dk, dv

        dq = jnp.zeros(q_BKHGT.shape, jnp.float32)
        dq, dk, dv = _visit(first, stop, tiles, add_key_tile, (dq, dk, dv))
        return (dk, dv), dq.astype(q.dtype)

    start = (jnp.zeros(k_JBKSH.shape, jnp.float32), jnp.zeros(v_JBKSH.shape, jnp.float32))
    inputs = (q_CBKHGT, g_CBKHGT, inner_CBK1GT, tiles, statistics)
    (dk, dv), dq_CBKHGT = jax.lax.scan(query_tile, start, inputs)
    return _from_query_tiles(dq_CBKHGT, q), _from_key_tiles(dk, k), _from_key_tiles(dv, v), None


_attend.defvjp(_attend_fwd, _attend_bwd)


# ------------------------------------------------------------------------------------- tiles


def _visit(first, stop, tiles: Tiles, add_key_tile, carry):
    """Fold `add_key_tile(j, carry)` over the key tiles from `first` to before `stop`.

    If there is a single tile in all, it needs no loop.
    """
    if len(tiles.first_C) == 1:
        return add_key_tile(0, carry)
    return jax.lax.fori_loop(first, stop, add_key_tile, carry)


def _pad_to_tiles(x_BTNH: jax.Array, tiles: Tiles) -> jax.Array:
    """Return x with zeros behind its last position, so that the rows are whole tiles."""
    count, size = tiles.visible_CJBST.shape[0], tiles.visible_CJBST.shape[-1]
    return jnp.pad(x_BTNH, ((0, 0), (0, count * size - x_BTNH.shape[1]), (0, 0), (0, 0)))


def _query_tiles(x_BTNH: jax.Array, k_BTKH: jax.Array, tiles: Tiles) -> jax.Array:
    """Return x [B,T,N,H] as tiles of queries [C,B,K,H,G,t]."""
    sizes = {"c": len(tiles.first_C), "k": k_BTKH.shape[2]}
    return rearrange(_pad_to_tiles(x_BTNH, tiles), "b (c t) (k g) h -> c b k h g t", **sizes)


def _from_query_tiles(x_CBKHGT: jax.Array, like_BTNH: jax.Array) -> jax.Array:
    """Undo `_query_tiles`, without the padding."""
    x_BTNH = rearrange(x_CBKHGT, "c b k h g t -> b (c t) (k g) h")
    return x_BTNH[:, : like_BTNH.shape[1]]


def _key_tiles(x_BTKH: jax.Array, tiles: Tiles) -> jax.Array:
    """Return x [B,T,K,H] as tiles of keys [J,B,K,S,H]."""
    count = len(tiles.first_C)
    return rearrange(_pad_to_tiles(x_BTKH, tiles), "b (j s) k h -> j b k s h", j=count)


def _from_key_tiles(x_JBKSH: jax.Array, like_BTKH: jax.Array) -> jax.Array:
    """Undo `_key_tiles`, without the padding, in the dtype of `like_BTKH`."""
    x_BTKH = rearrange(x_JBKSH, "j b k s h -> b (j s) k h")
    return x_BTKH[:, : like_BTKH.shape[1]].astype(like_BTKH.dtype)
