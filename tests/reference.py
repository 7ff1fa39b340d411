"""Reference formulas for tests, where the package computes the same numbers in another way."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unimoe_jax.stages.losses import token_nll


def cross_entropy(
    logits_BTV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (Σ weight · −log p(target), Σ weight), float32 scalars.

    Divide the first by the second for the mean per target token. Training computes the loss without
    keeping all logits (`unimoe_jax/nn/head.py`).
    """
    return jnp.sum(weight_BT * token_nll(logits_BTV, target_BT)), jnp.sum(weight_BT)
