"""Softmax attention as one pure function, in chunks of queries so that the scores stay small.

Scores are stored transposed, [keys, queries of all heads that share the key]. Every large product
is then a plain batched matrix product of operands in the order in which they are stored, forward
and backward, and the statistics of the softmax run along the last axis. One custom gradient keeps
these statistics instead of the weights (the backward pass of arXiv 2205.14135, section 3.1).

`packed.py` is faster where most of the mask is False.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

QUERY_CHUNK = 128
"""Queries per chunk, or a multiple of this number where there would be too many chunks."""
MAX_CHUNKS = 16
"""The largest number of chunks; every chunk is a separate piece of the program."""
MASKED = -1e30
"""The score of a key that is not visible. It is finite, so that a query without any visible key
averages the values instead of becoming NaN."""


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    scale: float,
    mask_BTS: jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(scale · q kᵀ + bias, masked) v, with N query heads over K key heads.

    Scores and softmax are float32 (arXiv 1706.03762, eq. 1).

    Args:
        q_BTNH: queries. K divides N, and N / K neighbouring query heads share a key head.
        k_BSKH, v_BSKH: keys and values.
        scale: the factor of the products of queries and keys.
        mask_BTS: bool, True where the key is visible; B and T may be 1.
        bias_BNTS: added to the scores; B, T and S may be 1.

    Returns:
        [B,T,N,H] in the dtype of q.
    """
    return _attend(scale, q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, mask, bias) -> jax.Array:
    """Compute `attend` with a gradient that needs no weights from the forward pass.

    Example: one query q = 1 over two keys (ln 3, 0) with values (4, 8), and scale 1. The scores are
    (ln 3, 0), their maximum is ln 3, and the sum of exp(score − maximum) is 1 + 1/3 = 4/3. The
    forward pass keeps these two numbers and the output 0.75 · 4 + 0.25 · 8 = 5. For an output
    gradient of 1 the backward pass computes the weights (0.75, 0.25) again, and the gradient of the
    scores as weights · (values − output) = (0.75 · −1, 0.25 · 3) = (−0.75, 0.75).
    """
    return _forward(scale, q, k, v, mask, bias)[0]


def _forward(scale, q, k, v, mask, bias):
    """Return the output, and the statistics (maximum, sum) of every chunk, each [B,K,1,G,t]."""
    q_BKHGT, k_BKSH = _split_heads(q, k.shape[2]), jnp.swapaxes(k, 1, 2)
    v_BKHS = rearrange(v, "b s k h -> b k h s")
    mask_BST, bias_BKSGT = _transposed(mask, bias, k.shape[2])
    outs, statistics = [], []
    for start, stop in _chunks(q.shape[1]):
        q_chunk = _cut(q_BKHGT, start, stop)
        mask_chunk = _cut_if_given(mask_BST, start, stop)
        bias_chunk = _cut_if_given(bias_BKSGT, start, stop)
        scores = masked_scores(scale, q_chunk, k_BKSH, mask_chunk, bias_chunk)
        # Subtract the maximum of every query, so that the exponentials cannot overflow.
        top = jnp.max(scores, axis=2, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=2, keepdims=True)
        outs.append(product(v_BKHS, weights.astype(v.dtype)) / total)
        statistics.append((top, total))
    return _join_heads(jnp.concatenate(outs, axis=-1)).astype(q.dtype), statistics


def _attend_fwd(scale, q, k, v, mask, bias):
    out, statistics = _forward(scale, q, k, v, mask, bias)
    return out, (q, k, v, mask, bias, out, statistics)


def _attend_bwd(scale, residuals, g):
    q, k, v, mask, bias, out, statistics = residuals
    heads = k.shape[2]
    q_BKHGT, g_BKHGT, out_BKHGT = (_split_heads(x, heads) for x in (q, g.astype(q.dtype), out))
    # The softmax needs Σ_s weights · dweights for every query. It equals the product of the output
    # with its gradient, which needs no sum over keys.
    inner = g_BKHGT.astype(jnp.float32) * out_BKHGT.astype(jnp.float32)
    inner_BK1GT = jnp.sum(inner, axis=2, keepdims=True)
    k_BKSH, v_BKSH = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    mask_BST, bias_BKSGT = _transposed(mask, bias, heads)
    dq, dbias = [], []
    dk, dv = jnp.zeros(k_BKSH.shape, jnp.float32), jnp.zeros(v_BKSH.shape, jnp.float32)
    for (start, stop), (top, total) in zip(_chunks(q.shape[1]), statistics, strict=True):
        # Compute the weights of the chunk again, from its scores and statistics.
        q_chunk, g_chunk = _cut(q_BKHGT, start, stop), _cut(g_BKHGT, start, stop)
        mask_chunk = _cut_if_given(mask_BST, start, stop)
        bias_chunk = _cut_if_given(bias_BKSGT, start, stop)
        scores = masked_scores(scale, q_chunk, k_BKSH, mask_chunk, bias_chunk)
        weights = jnp.exp(scores - top) * (1 / total)
        # The gradient of the scores. Masked scores are a constant, so their gradient is 0; without
        # this, a query that sees no key at all would pass a gradient on.
        dscores = weights * (product(v_BKSH, g_chunk) - inner_BK1GT[..., start:stop])
        if mask_chunk is not None:
            dscores = jnp.where(over_heads(mask_chunk), dscores, 0.0)
        if bias is not None:
            dbias.append(_like_bias(dscores, bias))
        # Queries belong to one chunk each; keys and values collect gradients from all chunks.
        dscores = (scale * dscores).astype(q.dtype)
        dq.append(product(jnp.swapaxes(k_BKSH, 2, 3), dscores))
        dk += times_queries(dscores, q_chunk)
        dv += times_queries(weights.astype(v.dtype), g_chunk)
    dq_BTNH = _join_heads(jnp.concatenate(dq, axis=-1)).astype(q.dtype)
    dk_BSKH = jnp.swapaxes(dk, 1, 2).astype(k.dtype)
    dv_BSKH = jnp.swapaxes(dv, 1, 2).astype(v.dtype)
    return dq_BTNH, dk_BSKH, dv_BSKH, None, _join_chunks(dbias, bias)


_attend.defvjp(_attend_fwd, _attend_bwd)


# ------------------------------------------------------------------------------------ chunks


def _chunks(queries: int) -> list[tuple[int, int]]:
    """Return (start, stop) of every chunk: at most MAX_CHUNKS, all but the last of equal size.

    Example: 300 queries are cut at 128 and 256. For 3000 queries chunks of 128 would be too many,
    so the chunks have 256 queries, and there are 12 of them.
    """
    smallest_size = -(-queries // MAX_CHUNKS)
    size = QUERY_CHUNK * max(1, -(-smallest_size // QUERY_CHUNK))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def _cut(x: jax.Array, start: int, stop: int) -> jax.Array:
    """Return the queries of a chunk, which are along the last axis.

    An axis of size 1 holds a value that all queries share, so it is not cut.
    """
    return x if x.shape[-1] == 1 else x[..., start:stop]


def _cut_if_given(x: jax.Array | None, start: int, stop: int) -> jax.Array | None:
    return None if x is None else _cut(x, start, stop)


def _like_bias(dscores: jax.Array, bias: jax.Array) -> jax.Array:
    """Return the gradient of a chunk's bias: summed over every axis along which it is shared."""
    d_BNTS = rearrange(dscores, "b k s g t -> b (k g) t s")
    shared = tuple(axis for axis in range(4) if bias.shape[axis] == 1 and d_BNTS.shape[axis] > 1)
    return jnp.sum(d_BNTS, axis=shared, keepdims=True)


def _join_chunks(dbias: list[jax.Array], bias: jax.Array | None) -> jax.Array | None:
    """Return the gradient of the whole bias from those of chunks, or None if there is no bias."""
    if bias is None:
        return None
    # A bias that all queries share collects a gradient from every chunk.
    joined: Any = sum(dbias) if bias.shape[2] == 1 else jnp.concatenate(dbias, axis=2)
    return joined.astype(bias.dtype)


# ---------------------------------------------------------------------------------- products


def _split_heads(x_BTNH: jax.Array, heads: int) -> jax.Array:
    """Return x [B,T,N,H] as [B,K,H,G,T]: the G query heads of each of K key heads, queries last."""
    return rearrange(x_BTNH, "b t (k g) h -> b k h g t", k=heads)


def _join_heads(x_BKHGT: jax.Array) -> jax.Array:
    """Undo `_split_heads`."""
    return rearrange(x_BKHGT, "b k h g t -> b t (k g) h")


def _transposed(mask_BTS, bias_BNTS, heads: int):
    """Return (mask [B,S,T], bias [B,K,S,G,T] float32) in the order of the transposed scores."""
    if mask_BTS is not None:
        mask_BTS = jnp.swapaxes(mask_BTS, 1, 2)
    if bias_BNTS is not None:
        bias_BNTS = rearrange(bias_BNTS, "b (k g) t s -> b k s g t", k=heads).astype(jnp.float32)
    return mask_BTS, bias_BNTS


def over_heads(mask_BST: jax.Array) -> jax.Array:
    """Return the mask with axes for key heads and query heads, to go with scores [B,K,S,G,T]."""
    return mask_BST[:, None, :, None, :]


def masked_scores(scale, q_BKHGT, k_BKSH, mask_BST, bias_BKSGT=None) -> jax.Array:
    """Return scale · q kᵀ + bias, float32 [B,K,S,G,T], with MASKED where the mask is False."""
    scores = scale * product(k_BKSH, q_BKHGT)
    if bias_BKSGT is not None:
        scores += bias_BKSGT
    return scores if mask_BST is None else jnp.where(over_heads(mask_BST), scores, MASKED)


def product(x_BKOI: jax.Array, y_BKIGT: jax.Array) -> jax.Array:
    """Return x y for every batch row and key head, float32 [B,K,O,G,T].

    The G query heads and T queries become one axis, so that it is one matrix product per key head.
    """
    batch, heads, inner, group, length = y_BKIGT.shape
    y = jnp.matmul(
        x_BKOI,
        y_BKIGT.reshape(batch, heads, inner, group * length),
        preferred_element_type=jnp.float32,
    )
    return y.reshape(*x_BKOI.shape[:-1], group, length)


def times_queries(x_BKSGT: jax.Array, y_BKHGT: jax.Array) -> jax.Array:
    """Return x yᵀ, summed over query heads and queries, float32 [B,K,S,H]."""
    x, y = (a.reshape(*a.shape[:3], -1) for a in (x_BKSGT, y_BKHGT))
    return jnp.matmul(x, jnp.swapaxes(y, 2, 3), preferred_element_type=jnp.float32)
