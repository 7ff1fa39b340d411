"""Attention of one new token per sequence against cached keys and values.

The cache of a sequence is a ring of S slots. The keys already contain their positions (rotary
embedding), so it does not matter in which slot a key is stored. All sequences of a batch therefore
write at one common cursor, however long each sequence is, and a sequence sees the slots that it
filled last. One write per layer serves the whole batch.

Keys are stored as [B,K,H,S] and values as [B,K,S,H], because then both products run along the last
axis of the array that they read.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from unimoe_jax.nn.attention.attend import MASKED


class KVCache(NamedTuple):
    """Keys [B,K,H,S] and values [B,K,S,H] of one layer, in the compute dtype.

    The cache of a single sequence may omit the axis B. A loop that carries an axis of one element
    would copy the cache in every round, because XLA on CPUs removes that axis before each product
    by writing a new array.
    """

    k: jax.Array
    v: jax.Array

    @property
    def slots(self) -> int:
        """S: the number of tokens that a sequence can hold."""
        return self.k.shape[-1]


def write(cache: KVCache, k_BKH: jax.Array, v_BKH: jax.Array, cursor: jax.Array) -> KVCache:
    """Return the cache with one new token of every sequence in slot `cursor` modulo S.

    Example: with S = 4 slots and cursor 5, the token overwrites slot 1.
    """
    slot = cursor % cache.slots
    if cache.k.ndim == 3:
        k_BKH, v_BKH = k_BKH[0], v_BKH[0]
    return KVCache(
        jax.lax.dynamic_update_slice_in_dim(cache.k, k_BKH[..., None], slot, axis=-1),
        jax.lax.dynamic_update_slice_in_dim(cache.v, v_BKH[..., None, :], slot, axis=-2),
    )


def visible(cursor: jax.Array, length_B: jax.Array, slots: int) -> jax.Array:
    """Return bool [B,S]: the slots of the last `length_B[b]` tokens; the newest is at `cursor`.

    Example: with 4 slots and cursor 5, the newest token is in slot 1, and a sequence of length 3
    sees the slots 1, 0 and 3.
    """
    age_S = (cursor - jnp.arange(slots)) % slots
    return age_S[None] < length_B[:, None]


def attend_one(
    q_BNH: jax.Array, cache: KVCache, visible_BS: jax.Array, *, scale: float
) -> jax.Array:
    """Return softmax(scale · q kᵀ, masked) v for one query per sequence, N heads over K key heads.

    Scores and softmax are float32 (arXiv 1706.03762, eq. 1).

    Returns:
        [B,N,H] in the dtype of q.
    """
    q = rearrange(q_BNH, "b (k g) h -> b k g h", k=cache.k.shape[-3])
    visible = visible_BS[:, None, None]
    if cache.k.ndim == 3:
        q, visible = q[0], visible[0]
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scale * product("...gh,...hs->...gs", q, cache.k), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(cache.v.dtype)
    out = product("...gs,...sh->...gh", weights, cache.v)
    return out.reshape(q_BNH.shape).astype(q_BNH.dtype)
