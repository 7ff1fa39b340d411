"""Softmax attention over packed rows, tile by tile: tiles that no query sees are not looked at.

Rows hold several samples, and a query sees its own sample's keys that are not later. Queries and
keys are cut into tiles, and a tile of queries visits the tiles of keys from the first to the last
that one of its queries sees in any row of the batch. The span is data, the shapes are not; what a
tile contributes is added up with the softmax of arXiv 2205.14135, section 3.1, whose statistics are
all that the backward pass keeps. Scores are transposed as in `attention.py`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from unimoe_jax.nn.attention.attend import masked_scores, over_heads, product, times_queries

TILE = 64
MOST_TILES = 16


class Tiles(NamedTuple):
    """Who sees whom, for all layers. C tiles of t positions; J = C and S = t where they are keys'.

    visible_CJBST: bool, True where the key is visible; B may be 1.
    first_C, stop_C: int32, the tiles of keys that the tile of queries visits.
    """

    visible_CJBST: jax.Array
    first_C: jax.Array
    stop_C: jax.Array


def tiles_of(mask_BTS: jax.Array, valid_BT: jax.Array) -> Tiles:
    """Tiles of a mask over packed rows (True where query t sees key s; T = S).

    valid_BT: False for queries of which nothing is asked but a finite output. Without this, those
    that fill up a row see each other from afar.
    """
    length = mask_BTS.shape[1]
    size = TILE * -(-length // (TILE * MOST_TILES))
    count = -(-length // size)
    room = (0, count * size - length)
    mask_BTS = jnp.pad(mask_BTS, ((0, 0), room, room))
    asked_BT1 = jnp.pad(valid_BT, ((0, 0), room))[:, :, None]
    split = partial(rearrange, pattern="b (c t) (j s) -> c j b s t", t=size, s=size)
    # One's own tile is always visited, so that every sum of weights is positive.
    seen_CJ = split(mask_BTS & asked_BT1).any((2, 3, 4)) | jnp.eye(count, dtype=bool)
    first_C = jnp.argmax(seen_CJ, axis=1).astype(jnp.int32)
    stop_C = count - jnp.argmax(seen_CJ[:, ::-1], axis=1).astype(jnp.int32)
    return Tiles(split(mask_BTS), first_C, stop_C)


def attend_packed(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, tiles: Tiles, *, scale: float
) -> jax.Array:
    """softmax(scale · q kᵀ, masked) v, with N query heads over K key heads (K divides N).

    Returns:
        [B,T,N,H] in the dtype of q. Scores and softmax are float32 (arXiv 1706.03762, eq. 1).
    """
    return _attend(scale, q_BTNH, k_BTKH, v_BTKH, tiles)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, tiles) -> jax.Array:
    return _forward(scale, q, k, v, tiles)[0]


def _forward(scale, q, k, v, tiles):
    """Output, and what the backward pass needs of every tile: (maximum, sum), [C,B,K,1,G,t]."""
    k_JBKSH, v_JBKHS = _keys(k, tiles), jnp.swapaxes(_keys(v, tiles), 3, 4)

    def one(_, inputs):
        q_BKHGT, (visible_JBST, first, stop) = inputs

        def add(j, carry):
            out, top, total = carry
            scores = masked_scores(scale, q_BKHGT, k_JBKSH[j], visible_JBST[j])
            higher = jnp.maximum(top, jnp.max(scores, axis=2, keepdims=True))
            shrink, weights = jnp.exp(top - higher), jnp.exp(scores - higher)
            out = shrink * out + product(v_JBKHS[j], weights.astype(v.dtype))
            return out, higher, shrink * total + jnp.sum(weights, axis=2, keepdims=True)

        out = jnp.zeros(q_BKHGT.shape, jnp.float32)
        none = jnp.zeros_like(out[:, :, :1])
        out, top, total = _visit(first, stop, tiles, add, (out, none - jnp.inf, none))
        return None, ((out / total).astype(q.dtype), top, total)

    _, (out_CBKHGT, *statistics) = jax.lax.scan(one, None, (_queries(q, k, tiles), tiles))
    return _from_queries(out_CBKHGT, q), statistics


def _attend_fwd(scale, q, k, v, tiles):
    out, statistics = _forward(scale, q, k, v, tiles)
    return out, (q, k, v, tiles, out, statistics)


def _attend_bwd(scale, kept, g):
    q, k, v, tiles, out, statistics = kept
    k_JBKSH, v_JBKSH = _keys(k, tiles), _keys(v, tiles)
    q_CBKHGT, g_CBKHGT, out_CBKHGT = (_queries(x, k, tiles) for x in (q, g.astype(q.dtype), out))
    # Σ_s weights · dweights, without the sum over keys: it is the output's own product.
    inner = g_CBKHGT.astype(jnp.float32) * out_CBKHGT.astype(jnp.float32)
    inner_CBK1GT = jnp.sum(inner, axis=3, keepdims=True)

    def one(gradients, inputs):
        q_BKHGT, g_BKHGT, inner_BK1GT, (visible_JBST, first, stop), (top, total) = inputs

        def add(j, carry):
            dq, dk, dv = carry
            visible = visible_JBST[j]
            scores = masked_scores(scale, q_BKHGT, k_JBKSH[j], visible)
            weights = jnp.exp(scores - top) * (1 / total)
            dscores = weights * (product(v_JBKSH[j], g_BKHGT) - inner_BK1GT)
            dscores = jnp.where(over_heads(visible), scale * dscores, 0.0).astype(q.dtype)
            dq += product(jnp.swapaxes(k_JBKSH[j], 2, 3), dscores)
            dk = dk.at[j].add(times_queries(dscores, q_BKHGT))
            return dq, dk, dv.at[j].add(times_queries(weights.astype(v.dtype), g_BKHGT))

        dq = jnp.zeros(q_BKHGT.shape, jnp.float32)
        dq, *gradients = _visit(first, stop, tiles, add, (dq, *gradients))
        return tuple(gradients), dq.astype(q.dtype)

    empty = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_JBKSH, v_JBKSH))
    inputs = (q_CBKHGT, g_CBKHGT, inner_CBK1GT, tiles, statistics)
    (dk, dv), dq_CBKHGT = jax.lax.scan(one, empty, inputs)
    return _from_queries(dq_CBKHGT, q), _from_keys(dk, k), _from_keys(dv, v), None


_attend.defvjp(_attend_fwd, _attend_bwd)


# ------------------------------------------------------------------------------------- tiles


def _visit(first, stop, tiles: Tiles, add, carry):
    """`add` for the tiles of keys from `first` to before `stop`; a single tile needs no loop."""
    if len(tiles.first_C) == 1:
        return add(0, carry)
    return jax.lax.fori_loop(first, stop, add, carry)


def _padded(x_BTNH: jax.Array, tiles: Tiles) -> jax.Array:
    count, size = tiles.visible_CJBST.shape[0], tiles.visible_CJBST.shape[-1]
    return jnp.pad(x_BTNH, ((0, 0), (0, count * size - x_BTNH.shape[1]), (0, 0), (0, 0)))


def _queries(x_BTNH: jax.Array, k_BTKH: jax.Array, tiles: Tiles) -> jax.Array:
    sizes = {"c": len(tiles.first_C), "k": k_BTKH.shape[2]}
    return rearrange(_padded(x_BTNH, tiles), "b (c t) (k g) h -> c b k h g t", **sizes)


def _from_queries(x_CBKHGT: jax.Array, like_BTNH: jax.Array) -> jax.Array:
    x_BTNH = rearrange(x_CBKHGT, "c b k h g t -> b (c t) (k g) h")
    return x_BTNH[:, : like_BTNH.shape[1]]


def _keys(x_BTKH: jax.Array, tiles: Tiles) -> jax.Array:
    return rearrange(_padded(x_BTKH, tiles), "b (j s) k h -> j b k s h", j=len(tiles.first_C))


def _from_keys(x_JBKSH: jax.Array, like_BTKH: jax.Array) -> jax.Array:
    x_BTKH = rearrange(x_JBKSH, "j b k s h -> b (j s) k h")
    return x_BTKH[:, : like_BTKH.shape[1]].astype(like_BTKH.dtype)
