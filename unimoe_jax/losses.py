"""Losses as pure functions of logits and router statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unimoe_jax.config import AuxLossConfig
from unimoe_jax.nn.moe import MoEAux


def cross_entropy(
    logits_BTV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(Σ weight · −log p(target), Σ weight), float32 scalars.

    The target stands at the position that predicts it. Divide the first by the second for the mean
    per target token.
    """
    logits = logits_BTV.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, target_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weight_BT * (log_z - picked)), jnp.sum(weight_BT)


def router_losses(aux: MoEAux | None, config: AuxLossConfig) -> jax.Array:
    """config.balance · Σ_layers balance + config.router_z · mean over layers of z.

    The balance term is summed over layers (Uni-MoE 8e, `aux_balance_loss_coef`); each term carries
    gradient into the routers.
    """
    if aux is None:
        return jnp.float32(0)
    return config.balance * jnp.sum(aux.balance) + config.router_z * jnp.mean(aux.router_z)


def exact_tokens(
    logits_BTV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array
) -> jax.Array:
    """bool [B,T]: the most likely token is the target, or there is no target here.

    A segment that is True throughout is answered exactly by greedy decoding: by induction each
    greedy token equals the reference, so the next one is predicted from the reference prefix.
    """
    return (jnp.argmax(logits_BTV, axis=-1) == target_BT) | (weight_BT == 0)
