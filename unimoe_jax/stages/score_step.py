"""The jitted step that scores a batch by exact match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unimoe_jax.data.batch import Batch
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.params.paths import nest


def make_score_step(model: UniMoE):
    """Make `score(params, batch) -> (exact_BS, real_BS)`, bool for every row and sample.

    Sample s of a row is its segment s + 1. It is real if it has targets at all, and exact if
    greedy decoding would give every target, see `TokenLoss`. S is half the row length, because a
    sample has at least two positions.
    """

    def score(params: Mapping[str, jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
        rngs = {"router": jax.random.key(0)}
        output: Any = model.apply({"params": nest(params)}, batch, "exact", rngs=rngs)
        exact_BT = output.loss.exact_BT
        segment_BTS = jax.nn.one_hot(batch.segment_BT - 1, batch.segment_BT.shape[1] // 2)
        targets_BS = jnp.einsum("bt,bts->bs", batch.weight_BT, segment_BTS)
        wrong_BS = jnp.einsum("bt,bts->bs", 1.0 - exact_BT, segment_BTS)
        real_BS = targets_BS > 0
        return real_BS & (wrong_BS == 0), real_BS

    return score
