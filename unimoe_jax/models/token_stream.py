"""Put text embeddings and soft tokens into one stream, by one gather that stays on its device."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_stream(text_BTD: jax.Array, soft_GSD: jax.Array | None, slot_BT: jax.Array) -> jax.Array:
    """Replace the embeddings at soft tokens by rows of the soft-token table: [B,T,D], as the text.

    x[b,t] = soft[g, slot[b,t]] where slot[b,t] ≥ 0, else text[b,t]; g is the data shard of row b.
    Differentiable in the text and in the table.

    Example with 4 rows on 2 data shards: rows 0 and 1 read table 0, rows 2 and 3 read table 1. The
    slots (−1, 0, 1, −1) of row 2 give text, soft[1,0], soft[1,1], text.

    Args:
        text_BTD: embeddings of the token ids; where a soft token is, the id is arbitrary.
        soft_GSD: the soft-token table of each of G data shards, or None without media.
        slot_BT: int32 row of the shard's table, −1 for text.
    """
    if soft_GSD is None:
        return text_BTD
    batch, length, width = text_BTD.shape
    shards = soft_GSD.shape[0]
    slot = slot_BT.reshape(shards, -1)
    # Every shard gathers from its table. Text gathers row 0, which the last line discards.
    rows = jnp.take_along_axis(soft_GSD, jnp.maximum(slot, 0)[..., None], axis=1)
    rows = rows.reshape(batch, length, width).astype(text_BTD.dtype)
    return jnp.where((slot_BT >= 0)[..., None], rows, text_BTD)
