"""Softmax attention as one pure function, in chunks of queries so that scores stay small.

Scores are transposed, [keys, queries of all heads that share the key]: every large product is then
a plain batched matrix product of operands as they lie, forward and backward, and the statistics of
the softmax run along the last axis. One custom gradient keeps these statistics instead of the
weights (the backward pass of arXiv 2205.14135, section 3.1). Where most of the mask is False, see
`packed_attention.py`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

QUERY_CHUNK = 128
MOST_CHUNKS = 16
# Finite, so that a row without any visible key averages the values instead of becoming NaN.
MASKED = -1e30


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    scale: float,
    mask_BTS: jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale · q kᵀ + bias, masked) v, with N query heads over K key heads (K divides N).

    Args:
        mask_BTS: bool, True where the key is visible; B and T may be 1.
        bias_BNTS: added to the scores; B, T and S may be 1.

    Returns:
        [B,T,N,H] in the dtype of q. Scores and softmax are float32 (arXiv 1706.03762, eq. 1).
    """
    return _attend(scale, q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, mask, bias) -> jax.Array:
    return _forward(scale, q, k, v, mask, bias)[0]


def _forward(scale, q, k, v, mask, bias):
    """Output, and what the backward pass needs of every chunk: (maximum, sum), [B,K,1,G,t]."""
    q_BKHGT, k_BKSH = _queries(q, k.shape[2]), jnp.swapaxes(k, 1, 2)
    v_BKHS = rearrange(v, "b s k h -> b k h s")
    mask_BST, bias_BKSGT = _by_key(mask, bias, k.shape[2])
    outs, statistics = [], []
    for start, stop in _chunks(q.shape[1]):
        cut = partial(_cut, start=start, stop=stop)
        scores = masked_scores(scale, cut(q_BKHGT), k_BKSH, cut(mask_BST), cut(bias_BKSGT))
        top = jnp.max(scores, axis=2, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=2, keepdims=True)
        outs.append(product(v_BKHS, weights.astype(v.dtype)) / total)
        statistics.append((top, total))
    return _from_queries(jnp.concatenate(outs, axis=-1)).astype(q.dtype), statistics


def _attend_fwd(scale, q, k, v, mask, bias):
    out, statistics = _forward(scale, q, k, v, mask, bias)
    return out, (q, k, v, mask, bias, out, statistics)


def _attend_bwd(scale, kept, g):
    q, k, v, mask, bias, out, statistics = kept
    heads = k.shape[2]
    q_BKHGT, g_BKHGT, out_BKHGT = (_queries(x, heads) for x in (q, g.astype(q.dtype), out))
    # Σ_s weights · dweights, without the sum over keys: it is the output's own product.
    inner = g_BKHGT.astype(jnp.float32) * out_BKHGT.astype(jnp.float32)
    inner_BK1GT = jnp.sum(inner, axis=2, keepdims=True)
    k_BKSH, v_BKSH = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    mask_BST, bias_BKSGT = _by_key(mask, bias, heads)
    dq, dbias = [], []
    dk, dv = jnp.zeros(k_BKSH.shape, jnp.float32), jnp.zeros(v_BKSH.shape, jnp.float32)
    for (start, stop), (top, total) in zip(_chunks(q.shape[1]), statistics, strict=True):
        cut = partial(_cut, start=start, stop=stop)
        q_cut, g_cut, mask_cut = cut(q_BKHGT), cut(g_BKHGT), cut(mask_BST)
        scores = masked_scores(scale, q_cut, k_BKSH, mask_cut, cut(bias_BKSGT))
        weights = jnp.exp(scores - top) * (1 / total)
        dscores = weights * (product(v_BKSH, g_cut) - inner_BK1GT[..., start:stop])
        if mask_cut is not None:
            dscores = jnp.where(over_heads(mask_cut), dscores, 0.0)
        if bias is not None:
            dbias.append(_like_bias(dscores, bias))
        dscores = (scale * dscores).astype(q.dtype)
        dq.append(product(jnp.swapaxes(k_BKSH, 2, 3), dscores))
        dk += times_queries(dscores, q_cut)
        dv += times_queries(weights.astype(v.dtype), g_cut)
    dq_BTNH = _from_queries(jnp.concatenate(dq, axis=-1)).astype(q.dtype)
    dk_BSKH = jnp.swapaxes(dk, 1, 2).astype(k.dtype)
    dv_BSKH = jnp.swapaxes(dv, 1, 2).astype(v.dtype)
    return dq_BTNH, dk_BSKH, dv_BSKH, None, _joined(dbias, bias)


_attend.defvjp(_attend_fwd, _attend_bwd)


# ------------------------------------------------------------------------------------ chunks


def _chunks(queries: int) -> list[tuple[int, int]]:
    """(first query, behind the last) of every chunk."""
    most = -(-queries // MOST_CHUNKS)
    size = QUERY_CHUNK * max(1, -(-most // QUERY_CHUNK))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def _cut(x: jax.Array | None, start: int, stop: int) -> jax.Array | None:
    """A chunk's part, of the queries along the last axis; what all of them share stays whole."""
    return x if x is None or x.shape[-1] == 1 else x[..., start:stop]


def _like_bias(dscores: jax.Array, bias: jax.Array) -> jax.Array:
    """Gradient of the chunk's bias: summed over what the bias shares."""
    d_BNTS = rearrange(dscores, "b k s g t -> b (k g) t s")
    shared = tuple(axis for axis in range(4) if bias.shape[axis] == 1 and d_BNTS.shape[axis] > 1)
    return jnp.sum(d_BNTS, axis=shared, keepdims=True)


def _joined(parts: list[jax.Array], bias: jax.Array | None) -> jax.Array | None:
    if bias is None:
        return None
    joined = sum(parts) if bias.shape[2] == 1 else jnp.concatenate(parts, axis=2)
    return joined.astype(bias.dtype)


# ---------------------------------------------------------------------------------- products


def _queries(x_BTNH: jax.Array, heads: int) -> jax.Array:
    return rearrange(x_BTNH, "b t (k g) h -> b k h g t", k=heads)


def _from_queries(x_BKHGT: jax.Array) -> jax.Array:
    return rearrange(x_BKHGT, "b k h g t -> b t (k g) h")


def _by_key(mask_BTS, bias_BNTS, heads: int):
    """(mask [B,S,T], bias [B,K,S,G,T] float32) as transposed scores want them."""
    if mask_BTS is not None:
        mask_BTS = jnp.swapaxes(mask_BTS, 1, 2)
    if bias_BNTS is not None:
        bias_BNTS = rearrange(bias_BNTS, "b (k g) t s -> b k s g t", k=heads).astype(jnp.float32)
    return mask_BTS, bias_BNTS


def over_heads(mask_BST: jax.Array) -> jax.Array:
    return mask_BST[:, None, :, None, :]


def masked_scores(scale, q_BKHGT, k_BKSH, mask_BST, bias_BKSGT=None) -> jax.Array:
    scores = scale * product(k_BKSH, q_BKHGT)
    if bias_BKSGT is not None:
        scores += bias_BKSGT
    return scores if mask_BST is None else jnp.where(over_heads(mask_BST), scores, MASKED)


def product(x_BKOI: jax.Array, y_BKIGT: jax.Array) -> jax.Array:
    """x y for every batch row and key head, all its query heads at once: float32 [B,K,O,G,T]."""
    *lead, group, length = y_BKIGT.shape
    y = jnp.matmul(
        x_BKOI, y_BKIGT.reshape(*lead, group * length), preferred_element_type=jnp.float32
    )
    return y.reshape(*x_BKOI.shape[:-1], group, length)


def times_queries(x_BKSGT: jax.Array, y_BKHGT: jax.Array) -> jax.Array:
    """x yᵀ, summed over query heads and queries: float32 [B,K,S,H]."""
    x, y = (a.reshape(*a.shape[:3], -1) for a in (x_BKSGT, y_BKHGT))
    return jnp.matmul(x, jnp.swapaxes(y, 2, 3), preferred_element_type=jnp.float32)
