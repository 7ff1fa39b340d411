"""Routing as pure functions: which experts a token goes to, its weights, and statistics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unimoe_jax.config import RouterConfig
from unimoe_jax.config.media import NUM_MODALITIES


class Routing(NamedTuple):
    """Decisions for X tokens.

    expert_XK: int32 in [0, E]; E means "no expert" and costs nothing downstream.
    weight_XK: float32, 0 where there is no expert.
    probs_XE: float32 softmax of the clean logits.
    logits_XE: float32 logits, with the sampling noise where it was drawn (as 8e returns them).
    clean_XE: float32 logits without it.
    """

    expert_XK: jax.Array
    weight_XK: jax.Array
    probs_XE: jax.Array
    logits_XE: jax.Array
    clean_XE: jax.Array


def route(
    logits_XE: jax.Array,
    top_k: int,
    config: RouterConfig,
    dtype: jnp.dtype,
    valid_X: jax.Array,
    noise_XE: jax.Array | None = None,
) -> Routing:
    """Choose `top_k` experts for every valid token; the weights sum to one.

    Softmax over the top-k logits (Uni-MoE) equals softmax over all, top-k, renormalise (Mixtral,
    CuMo) up to rounding; `config.dtype_order` says where values are rounded to `dtype`.
    With `noise_XE` (standard Gumbel) the experts after the first are drawn from the router's
    distribution without the first, and weighted by their clean probabilities (Uni-MoE 8e).
    """
    num_experts = logits_XE.shape[-1]
    logits = logits_XE.astype(jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1)
    returned = logits
    if noise_XE is not None:
        returned = logits + noise_XE
        expert = _sampled(logits, returned, top_k)
        chosen = jnp.take_along_axis(probs, expert, axis=-1)
        weight = chosen / jnp.maximum(chosen.sum(-1, keepdims=True), jnp.finfo(jnp.float32).eps)
        weight = weight.astype(dtype)
    elif config.dtype_order == "topk_softmax":
        chosen, expert = jax.lax.top_k(logits, top_k)
        weight = jax.nn.softmax(chosen, axis=-1).astype(dtype)
    else:
        ranked = probs.astype(dtype) if config.dtype_order == "softmax_cast_topk" else probs
        chosen, expert = jax.lax.top_k(ranked, top_k)
        weight = (chosen / chosen.sum(-1, keepdims=True)).astype(dtype)
    valid = valid_X[:, None]
    return Routing(
        expert_XK=jnp.where(valid, expert, num_experts).astype(jnp.int32),
        weight_XK=jnp.where(valid, weight.astype(jnp.float32), 0.0),
        probs_XE=probs,
        logits_XE=returned,
        clean_XE=logits,
    )


def _sampled(logits: jax.Array, noisy: jax.Array, top_k: int) -> jax.Array:
    first = jnp.argmax(logits, axis=-1, keepdims=True)
    others = jnp.where(jnp.arange(logits.shape[-1])[None] == first, -jnp.inf, noisy)
    rest = jax.lax.top_k(others, top_k - 1)[1] if top_k > 1 else first[:, :0]
    return jnp.concatenate([first, rest], axis=-1)


# Statistics are float32, but accelerators round the factors of products unless asked not to.
_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def balance_loss(routing: Routing, valid_X: jax.Array) -> jax.Array:
    """E · Σ_e mean(p_e) · share of tokens whose first choice is e; 1 when balanced.

    Below 1 where first choices and probabilities favour different experts.
    arXiv 2101.03961, eq. 4, over valid tokens. Gradient flows through the probabilities only.
    """
    num_experts = routing.probs_XE.shape[-1]
    weight = valid_X.astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    first_XE = jax.nn.one_hot(routing.expert_XK[:, 0], num_experts)
    mean_prob_E = _product(weight, routing.probs_XE) / total
    share_E = _product(weight, first_XE) / total
    return num_experts * jnp.sum(mean_prob_E * jax.lax.stop_gradient(share_E))


def router_z_loss(logits_XE: jax.Array, valid_X: jax.Array) -> jax.Array:
    """Mean over valid tokens of logsumexp(logits)² (arXiv 2202.08906, eq. 5)."""
    weight = valid_X.astype(jnp.float32)
    squared = jnp.square(jax.nn.logsumexp(logits_XE, axis=-1))
    return _product(weight, squared) / jnp.maximum(weight.sum(), 1.0)


def router_entropy(routing: Routing, valid_X: jax.Array) -> jax.Array:
    """Mean over valid tokens of the entropy of the router's distribution, in nats."""
    weight = valid_X.astype(jnp.float32)
    p = routing.probs_XE
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=-1)
    return _product(weight, entropy) / jnp.maximum(weight.sum(), 1.0)


def row_mean(
    routing: Routing,
    valid_BT: jax.Array,
    weight_B: jax.Array | None,
    statistic: Callable[[Routing, jax.Array], jax.Array],
) -> jax.Array:
    """`statistic(routing, valid_X)` over all B·T tokens, or with `weight_B` (float, not negative)
    the weighted mean of the statistics of the B rows; 0 when all weights are 0.
    """
    if weight_B is None:
        return statistic(routing, valid_BT.reshape(-1))
    rows = jax.tree.map(lambda a: a.reshape(*valid_BT.shape, *a.shape[1:]), routing)
    value_B = jax.vmap(statistic)(rows, valid_BT)
    total = weight_B.sum()
    return _product(weight_B, value_B) / jnp.where(total > 0, total, 1.0)


def expert_load(routing: Routing, modality_X: jax.Array) -> jax.Array:
    """Token slots per modality and expert, float32 [modalities, E]; padding counts nowhere."""
    num_experts = routing.probs_XE.shape[-1]
    to_XE = jax.nn.one_hot(routing.expert_XK, num_experts).sum(axis=1)
    return jax.nn.one_hot(modality_X, NUM_MODALITIES).T @ to_XE
