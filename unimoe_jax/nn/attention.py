"""Softmax attention as one pure function, in chunks of queries so that scores stay small.

Heads come before positions inside, so that every product is a plain batched matrix product and no
score is ever transposed. One custom gradient keeps the row statistics of the softmax instead of its
weights (the backward pass of arXiv 2205.14135, section 3.1), and a causal mask is worth half of the
work: a chunk of queries is multiplied with the keys up to its end only.
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
    causal: bool = False,
) -> jax.Array:
    """softmax(scale · q kᵀ + bias, masked) v, with N query heads over K key heads (K divides N).

    Args:
        mask_BTS: bool, True where the key is visible; B and T may be 1.
        bias_BNTS: added to the scores; B, T and S may be 1.
        causal: the caller's word that `mask_BTS` shows no query a key behind it (T = S); those
            keys are then not looked at.

    Returns:
        [B,T,N,H] in the dtype of q. Scores and softmax are float32 (arXiv 1706.03762, eq. 1).
    """
    return _attend(scale, causal, q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, causal, q, k, v, mask, bias) -> jax.Array:
    return _forward(scale, causal, q, k, v, mask, bias)[0]


def _forward(scale, causal, q, k, v, mask, bias):
    """Output, and what the backward pass needs of every chunk: (row maximum, row sum)."""
    heads = k.shape[2]
    q_BKGTH, k_BKSH, v_BKSH = _grouped(q, heads), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    outs, statistics = [], []
    for start, stop, keys in _chunks(q.shape[1], k.shape[1], causal):
        mask_cut, bias_cut = _cut(mask, 1, start, stop, keys), _cut(bias, 2, start, stop, keys)
        scores = _scores(
            scale, q_BKGTH[..., start:stop, :], k_BKSH[:, :, :keys], mask_cut, bias_cut
        )
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        outs.append(_product(weights.astype(v.dtype), v_BKSH[:, :, :keys]) / total)
        statistics.append((top, total))
    return _ungrouped(jnp.concatenate(outs, axis=3)).astype(q.dtype), statistics


def _attend_fwd(scale, causal, q, k, v, mask, bias):
    out, statistics = _forward(scale, causal, q, k, v, mask, bias)
    return out, (q, k, v, mask, bias, out, statistics)


def _attend_bwd(scale, causal, kept, g):
    q, k, v, mask, bias, out, statistics = kept
    heads = k.shape[2]
    q_BKGTH, k_BKSH, v_BKSH = _grouped(q, heads), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    g_BKGTH, out_BKGTH = _grouped(g.astype(q.dtype), heads), _grouped(out, heads)
    dq, dbias = [], []
    dk, dv = jnp.zeros(k_BKSH.shape, jnp.float32), jnp.zeros(v_BKSH.shape, jnp.float32)
    chunks = _chunks(q.shape[1], k.shape[1], causal)
    for (start, stop, keys), (top, total) in zip(chunks, statistics, strict=True):
        mask_cut, bias_cut = _cut(mask, 1, start, stop, keys), _cut(bias, 2, start, stop, keys)
        q_cut, g_cut = q_BKGTH[..., start:stop, :], g_BKGTH[..., start:stop, :]
        k_cut, v_cut = k_BKSH[:, :, :keys], v_BKSH[:, :, :keys]
        weights = jnp.exp(_scores(scale, q_cut, k_cut, mask_cut, bias_cut) - top) * (1 / total)
        # Σ_s weights · dweights, without the sum over keys: it is the output's own product.
        inner = g_cut.astype(jnp.float32) * out_BKGTH[..., start:stop, :].astype(jnp.float32)
        inner = jnp.sum(inner, axis=-1, keepdims=True)
        dscores = weights * (_product(g_cut, jnp.swapaxes(v_cut, 2, 3)) - inner)
        if mask_cut is not None:
            dscores = jnp.where(mask_cut[:, None, None], dscores, 0.0)
        if bias is not None:
            dbias.append(_like_cut(dscores, bias, keys, k.shape[1]))
        dscores = (scale * dscores).astype(q.dtype)
        dq.append(_product(dscores, k_cut))
        dk = dk.at[:, :, :keys].add(_transposed_product(dscores, q_cut))
        dv = dv.at[:, :, :keys].add(_transposed_product(weights.astype(v.dtype), g_cut))
    dq_BTNH = _ungrouped(jnp.concatenate(dq, axis=3)).astype(q.dtype)
    dk_BSKH = jnp.swapaxes(dk, 1, 2).astype(k.dtype)
    dv_BSKH = jnp.swapaxes(dv, 1, 2).astype(v.dtype)
    return dq_BTNH, dk_BSKH, dv_BSKH, None, _joined(dbias, bias)


_attend.defvjp(_attend_fwd, _attend_bwd)


# ------------------------------------------------------------------------------------ chunks


def _chunks(queries: int, keys: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, behind the last, keys that the chunk looks at)."""
    most = -(-queries // MOST_CHUNKS)
    size = QUERY_CHUNK * max(1, -(-most // QUERY_CHUNK))
    stops = [min(start + size, queries) for start in range(0, queries, size)]
    return [(number * size, stop, stop if causal else keys) for number, stop in enumerate(stops)]


def _cut(x: jax.Array | None, axis: int, start: int, stop: int, keys: int) -> jax.Array | None:
    """The part of a mask or bias for a chunk; what is shared by queries or keys stays whole."""
    if x is None:
        return None
    if x.shape[axis] > 1:
        x = jax.lax.slice_in_dim(x, start, stop, axis=axis)
    return x[..., :keys] if x.shape[-1] > 1 else x


def _like_cut(dscores: jax.Array, bias: jax.Array, keys: int, all_keys: int) -> jax.Array:
    """Gradient of the chunk's bias: summed over what the bias shares, zero for keys not seen."""
    d_BNTS = rearrange(dscores, "b k g t s -> b (k g) t s")
    shared = tuple(axis for axis in range(4) if bias.shape[axis] == 1 and d_BNTS.shape[axis] > 1)
    d_BNTS = jnp.sum(d_BNTS, axis=shared, keepdims=True)
    if bias.shape[-1] == 1 or keys == all_keys:
        return d_BNTS
    return jnp.pad(d_BNTS, [(0, 0), (0, 0), (0, 0), (0, all_keys - keys)])


def _joined(parts: list[jax.Array], bias: jax.Array | None) -> jax.Array | None:
    if bias is None:
        return None
    joined = sum(parts) if bias.shape[2] == 1 else jnp.concatenate(parts, axis=2)
    return joined.astype(bias.dtype)


# ---------------------------------------------------------------------------------- products


def _grouped(x_BTNH: jax.Array, heads: int) -> jax.Array:
    return rearrange(x_BTNH, "b t (k g) h -> b k g t h", k=heads)


def _ungrouped(x_BKGTH: jax.Array) -> jax.Array:
    return rearrange(x_BKGTH, "b k g t h -> b t (k g) h")


def _scores(scale, q_BKGTH, k_BKSH, mask_BTS, bias_BNTS) -> jax.Array:
    scores = scale * _product(q_BKGTH, jnp.swapaxes(k_BKSH, 2, 3))
    if bias_BNTS is not None:
        bias = bias_BNTS.astype(jnp.float32)
        scores += rearrange(bias, "b (k g) t s -> b k g t s", k=q_BKGTH.shape[1])
    if mask_BTS is not None:
        scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    return scores


def _product(x_BKGTI: jax.Array, y_BKIO: jax.Array) -> jax.Array:
    """x y for every batch row and key head, all its query heads at once: float32 [B,K,G,T,O]."""
    *lead, group, length, inner = x_BKGTI.shape
    y = jnp.matmul(
        x_BKGTI.reshape(*lead, group * length, inner), y_BKIO, preferred_element_type=jnp.float32
    )
    return y.reshape(*lead, group, length, -1)


def _transposed_product(x_BKGTS: jax.Array, y_BKGTO: jax.Array) -> jax.Array:
    """xᵀ y, summed over query heads and queries: float32 [B,K,S,O].

    Written as (yᵀ x)ᵀ: some backends copy the transposed operand, and y is the small one.
    """
    return jnp.einsum("bkgts,bkgto->bkso", x_BKGTS, y_BKGTO, preferred_element_type=jnp.float32)
