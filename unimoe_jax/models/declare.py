"""A batch of shapes, with which every parameter of a model is declared without computing it."""

from __future__ import annotations

from unimoe_jax.config import ModelConfig
from unimoe_jax.data.batch import Batch, batch_spec
from unimoe_jax.parallel.placement import structs


def full_batch(model: ModelConfig, shards: int = 1) -> Batch:
    """Shape structs of a small batch that holds every pool of the model.

    Encoders are declared only for the pools that a batch holds, so this batch declares all of them.
    It has one row of 8 positions and one entry per pool on each of `shards` data shards.
    """
    capacity = dict.fromkeys(model.tokens_per_medium(), 1)
    return structs(batch_spec(model, shards, 8, shards, capacity))
