"""Losses as pure functions of logits and router statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from unimoe_jax.config import AuxLossConfig, ModalityLossConfig, RouterLossConfig
from unimoe_jax.config.media import MODALITY_GROUPS, NUM_MODALITIES
from unimoe_jax.nn.moe.layer import MoEAux


def token_nll(logits_BTV: jax.Array, target_BT: jax.Array) -> jax.Array:
    """−log p(target) at every position, float32 [B,T].

    target_BT: int32, the token that position t predicts, so it is shifted by one already.
    """
    logits = logits_BTV.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, target_BT[..., None], axis=-1)[..., 0]


def modality_sums(value_BT: jax.Array, segment_BT: jax.Array, modality_BT: jax.Array) -> jax.Array:
    """Σ value over the samples that hold each modality, float32 [M], in the order of `MODALITY`.

    A sample (segment) without media counts as text; a sample with two media counts for both. For
    example, a row with the values 1 1 2 2, where the first two positions are a text sample and the
    others a sample with an image, gives 2 for text and 4 for image.
    """
    # Use one-hot matmuls instead of scatters, which are slow on CPUs, GPUs and TPUs. HIGHEST
    # precision, because accelerators round the factors of a product otherwise, and the sums are
    # reported. A sample has at least two positions, one that predicts and one that is predicted, so
    # half the row length bounds the number of samples.
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    segment_BTS = jax.nn.one_hot(segment_BT - 1, max(segment_BT.shape[1] // 2, 1))
    present_BTM = jax.nn.one_hot(modality_BT, NUM_MODALITIES).at[..., 0].set(0)
    holds_BSM = jnp.minimum(einsum("bts,btm->bsm", segment_BTS, present_BTM), 1)
    holds_BSM = holds_BSM.at[..., 0].set(1 - jnp.max(holds_BSM[..., 1:], axis=-1))
    sum_BS = einsum("bts,bt->bs", segment_BTS, value_BT)
    return einsum("bs,bsm->m", sum_BS, holds_BSM)


def router_losses(aux: Mapping[str, MoEAux], config: AuxLossConfig) -> jax.Array:
    """Σ over modules of `module_router_loss` with the coefficients of the module, float32."""
    parts = [module_router_loss(found, getattr(config, name)) for name, found in aux.items()]
    return sum(parts, jnp.float32(0))


def module_router_loss(aux: MoEAux, config: RouterLossConfig) -> jax.Array:
    """config.balance · balance + config.router_z · z of one module's routers, float32.

    The z-loss is a mean over layers. The balance loss is a mean (CuMo) or a sum over layers
    (`aux_balance_loss_coef` of Uni-MoE 8e).
    """
    over_layers = jnp.sum if config.balance_layers == "sum" else jnp.mean
    loss = config.balance * over_layers(aux.balance) + config.router_z * jnp.mean(aux.router_z)
    return jax.lax.stop_gradient(loss) if config.gradient == "none" else loss


# The pairs of modality groups whose mean routes 8e pushes apart.
_APART = (
    ("image", "audio"),
    ("image", "text"),
    ("audio", "text"),
    ("audio", "video"),
    ("video", "text"),
)


MODALITY_LOSSES = ("experts", "kl")


def modality_losses(
    aux: Mapping[str, MoEAux], modality_BT: jax.Array, config: ModalityLossConfig
) -> dict[str, jax.Array]:
    """The losses of `MODALITY_LOSSES` that have a coefficient, not scaled by it, by name.

    They are computed on the decoder's routers, and have a gradient there. (In 8e's code the
    gradient is lost in its gradient checkpointing.)
    """
    found = {}
    if config.experts:
        logits = aux["decoder"].logits_BTE
        found["experts"] = modality_expert_loss(logits, modality_BT, config.listed())
    if config.kl:
        found["kl"] = modality_kl_loss(aux["decoder"].logits_BTE, modality_BT)
    return found


def _in_group(modality_BT: jax.Array, group: str) -> jax.Array:
    """Which positions belong to a group of modalities, bool [B,T]."""
    return jnp.isin(modality_BT, jnp.asarray(MODALITY_GROUPS[group]))


def modality_expert_loss(
    logits_LBTE: jax.Array, modality_BT: jax.Array, experts: Mapping[str, Sequence[int]]
) -> jax.Array:
    """Σ over layers, rows and modalities of mean |softmax(logits) − target| · share of the row.

    This is Uni-MoE 8e's `aux_multimodal_loss`. The means are over tokens and experts; the share of
    a modality is its tokens / T.

    experts: image, video and audio -> the experts whose entries of the target are 1.
    """
    probs = jax.nn.softmax(logits_LBTE.astype(jnp.float32), axis=-1)
    length, num_experts = probs.shape[2:]
    total = jnp.float32(0)
    for group, chosen in experts.items():
        target_E = jnp.zeros(num_experts).at[jnp.asarray(chosen)].set(1.0)
        distance_LBT = jnp.abs(probs - target_E[None, None, None]).mean(-1)
        total += jnp.sum(distance_LBT * _in_group(modality_BT, group)[None]) / length
    return total


def modality_kl_loss(logits_LBTE: jax.Array, modality_BT: jax.Array) -> jax.Array:
    """Σ over layers and rows of the mean over pairs of modalities of 1 − KL(b ‖ a) / E.

    This is Uni-MoE 8e's `aux_kl_loss`. a and b are the modalities' mean router probabilities after
    another softmax. A pair counts only in rows that hold both modalities.
    """
    probs = jax.nn.softmax(logits_LBTE.astype(jnp.float32), axis=-1)
    log_mean, present = {}, {}
    for group in MODALITY_GROUPS:
        inside_BT = _in_group(modality_BT, group).astype(jnp.float32)
        count_B = inside_BT.sum(-1)
        sum_LBE = jnp.einsum("lbte,bt->lbe", probs, inside_BT)
        mean_LBE = sum_LBE / jnp.maximum(count_B, 1)[None, :, None]
        log_mean[group], present[group] = jax.nn.log_softmax(mean_LBE, axis=-1), count_B > 0
    total_B, pairs_B = jnp.zeros(probs.shape[1]), jnp.zeros(probs.shape[1])
    for a, b in _APART:
        both_B = (present[a] & present[b]).astype(jnp.float32)
        divergence_LB = jnp.mean(jnp.exp(log_mean[b]) * (log_mean[b] - log_mean[a]), axis=-1)
        total_B += both_B * jnp.sum(1 - divergence_LB, axis=0)
        pairs_B += both_B
    return jnp.sum(total_B / jnp.maximum(pairs_B, 1))
