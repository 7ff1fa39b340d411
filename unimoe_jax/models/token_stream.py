"""Text embeddings and soft tokens become one stream: a single local gather, differentiable."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_stream(text_BTD: jax.Array, soft_GSD: jax.Array | None, slot_BT: jax.Array) -> jax.Array:
    """x[b,t] = soft[g(b), slot] where slot ≥ 0, else text[b,t].

    Args:
        text_BTD: embeddings of token ids (of any id where a soft token stands).
        soft_GSD: the soft-token table of each of G data shards; row b belongs to shard b·G/B.
        slot_BT: int32 row of that table, −1 for text.
    """
    if soft_GSD is None:
        return text_BTD
    batch, length, width = text_BTD.shape
    shards = soft_GSD.shape[0]
    slot = slot_BT.reshape(shards, -1)
    rows = jnp.take_along_axis(soft_GSD, jnp.maximum(slot, 0)[..., None], axis=1)
    rows = rows.reshape(batch, length, width).astype(text_BTD.dtype)
    return jnp.where((slot_BT >= 0)[..., None], rows, text_BTD)
