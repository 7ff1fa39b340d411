"""Softmax attention as one pure function, chunked over queries so that scores stay small."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

QUERY_CHUNK = 256
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
        bias_BNTS: added to the scores; B may be 1.

    Returns:
        [B,T,N,H] in the dtype of q. Scores and softmax are float32 (arXiv 1706.03762, eq. 1).
    """
    length = q_BTNH.shape[1]
    # Recomputing the weights costs less than keeping and reading them back.
    attend_once = jax.checkpoint(_attend, static_argnums=(3,))
    if length <= 2 * QUERY_CHUNK:
        return attend_once(q_BTNH, k_BSKH, v_BSKH, scale, mask_BTS, bias_BNTS)
    pad = -length % QUERY_CHUNK
    chunks = (length + pad) // QUERY_CHUNK

    def cut(x: jax.Array | None, axis: int) -> jax.Array | None:
        if x is None or x.shape[axis] == 1:
            return x
        widths = [(0, pad if dim == axis else 0) for dim in range(x.ndim)]
        x = jnp.pad(x, widths)
        shape = (*x.shape[:axis], chunks, QUERY_CHUNK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    q_chunks = cut(q_BTNH, 1)
    mask_chunks, bias_chunks = cut(mask_BTS, 1), cut(bias_BNTS, 2)

    def one(chunk):
        q, mask, bias = chunk
        mask = mask_BTS if mask is None else mask
        bias = bias_BNTS if bias is None else bias
        return attend_once(q, k_BSKH, v_BSKH, scale, mask, bias)

    shared_mask = mask_BTS is not None and mask_BTS.shape[1] == 1
    shared_bias = bias_BNTS is not None and bias_BNTS.shape[2] == 1
    out = jax.lax.map(
        one,
        (q_chunks, None if shared_mask else mask_chunks, None if shared_bias else bias_chunks),
    )
    return rearrange(out, "c b t n h -> b (c t) n h")[:, :length]


def _attend(q, k, v, scale, mask, bias) -> jax.Array:
    heads = k.shape[2]
    q_grouped = rearrange(q, "b t (k g) h -> b t k g h", k=heads)
    scores = scale * jnp.einsum(
        "btkgh,bskh->bkgts", q_grouped, k, preferred_element_type=jnp.float32
    )
    if bias is not None:
        scores += rearrange(bias.astype(jnp.float32), "b (k g) t s -> b k g t s", k=heads)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return rearrange(out, "b t k g h -> b t (k g) h").astype(q.dtype)
