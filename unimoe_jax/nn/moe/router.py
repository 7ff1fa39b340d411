"""Routing as pure functions: the experts of a token, their weights, and statistics of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unimoe_jax.config import RouterConfig
from unimoe_jax.config.media import NUM_MODALITIES


class Routing(NamedTuple):
    """The decisions of a router for X tokens.

    expert_XK: int32 in [0, E]. The number E means "no expert", and such a choice costs nothing in
        the layers that follow.
    weight_XK: float32, 0 where there is no expert.
    probs_XE: float32, the softmax of the logits without noise.
    logits_XE: float32 logits, with the sampling noise if it was drawn (as Uni-MoE 8e returns them).
    clean_XE: float32 logits without the noise.
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
    """Choose `top_k` experts for every valid token; the weights of a token sum to one.

    Uni-MoE takes the softmax of the top-k logits. Mixtral and CuMo take the softmax of all logits,
    then the top k, and renormalise. Up to rounding both are the same, and `config.dtype_order` says
    where values are rounded to `dtype`.

    Example: the logits (ln 6, ln 2, 0, 0) have the probabilities (0.6, 0.2, 0.1, 0.1). The top 2
    are the experts 0 and 1, with the weights 0.6 / 0.8 = 0.75 and 0.2 / 0.8 = 0.25.

    Args:
        logits_XE: the output of the router's linear layer.
        top_k: K, the number of experts per token.
        config: its `dtype_order` is used.
        dtype: the compute dtype, to which weights are rounded.
        valid_X: bool. A token that is not valid goes to no expert.
        noise_XE: standard Gumbel noise, or None. With noise, as in Uni-MoE 8e, the first expert is
            still the best one. The experts after it are drawn from the router's distribution
            without the first, and are weighted by their probabilities without noise.
    """
    num_experts = logits_XE.shape[-1]
    logits = logits_XE.astype(jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1)
    returned = logits
    if noise_XE is not None:
        # Uni-MoE 8e in training: draw experts by noisy logits, and weigh them by probabilities.
        returned = logits + noise_XE
        expert = _sample_experts(logits, returned, top_k)
        chosen = jnp.take_along_axis(probs, expert, axis=-1)
        weight = chosen / jnp.maximum(chosen.sum(-1, keepdims=True), jnp.finfo(jnp.float32).eps)
        weight = weight.astype(dtype)
    elif config.dtype_order == "topk_softmax":
        # Uni-MoE: the softmax of the top-k logits, rounded once.
        chosen, expert = jax.lax.top_k(logits, top_k)
        weight = jax.nn.softmax(chosen, axis=-1).astype(dtype)
    else:
        # Mixtral and CuMo: renormalise the top-k probabilities. CuMo rounds them to `dtype` before.
        ranked = probs.astype(dtype) if config.dtype_order == "softmax_cast_topk" else probs
        chosen, expert = jax.lax.top_k(ranked, top_k)
        weight = (chosen / chosen.sum(-1, keepdims=True)).astype(dtype)
    # Send tokens that are not valid to no expert.
    valid = valid_X[:, None]
    return Routing(
        expert_XK=jnp.where(valid, expert, num_experts).astype(jnp.int32),
        weight_XK=jnp.where(valid, weight.astype(jnp.float32), 0.0),
        probs_XE=probs,
        logits_XE=returned,
        clean_XE=logits,
    )


def _sample_experts(logits: jax.Array, noisy: jax.Array, top_k: int) -> jax.Array:
    """Return the best expert by `logits`, followed by the best of the others by `noisy` logits.

    The maximum of logits with Gumbel noise is a sample from their softmax.
    """
    first = jnp.argmax(logits, axis=-1, keepdims=True)
    others = jnp.where(jnp.arange(logits.shape[-1])[None] == first, -jnp.inf, noisy)
    rest = jax.lax.top_k(others, top_k - 1)[1] if top_k > 1 else first[:, :0]
    return jnp.concatenate([first, rest], axis=-1)


# Statistics are reported, so they need float32. Accelerators round the factors of float32 products
# unless the precision is set.
_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def balance_loss(routing: Routing, valid_X: jax.Array) -> jax.Array:
    """Return E · Σ_e mean(p_e) · (share of tokens whose first choice is e), float32.

    This is eq. 4 of arXiv 2101.03961 over valid tokens. It is 1 when the router is balanced, E when
    every token goes to one expert with probability 1, and below 1 where first choices and
    probabilities favour different experts. The gradient flows through the probabilities only.

    Example: two experts, and two tokens with the probabilities (0.9, 0.1) and (0.7, 0.3). The mean
    is (0.8, 0.2) and both first choices are expert 0, so the loss is 2 · (0.8 · 1 + 0.2 · 0) = 1.6.
    """
    num_experts = routing.probs_XE.shape[-1]
    weight = valid_X.astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    first_XE = jax.nn.one_hot(routing.expert_XK[:, 0], num_experts)
    mean_prob_E = _product(weight, routing.probs_XE) / total
    share_E = _product(weight, first_XE) / total
    return num_experts * jnp.sum(mean_prob_E * jax.lax.stop_gradient(share_E))


def router_z_loss(logits_XE: jax.Array, valid_X: jax.Array) -> jax.Array:
    """Return the mean over valid tokens of logsumexp(logits)² (arXiv 2202.08906, eq. 5)."""
    weight = valid_X.astype(jnp.float32)
    squared = jnp.square(jax.nn.logsumexp(logits_XE, axis=-1))
    return _product(weight, squared) / jnp.maximum(weight.sum(), 1.0)


def router_entropy(routing: Routing, valid_X: jax.Array) -> jax.Array:
    """Return the mean over valid tokens of the entropy of the router's distribution, in nats."""
    weight = valid_X.astype(jnp.float32)
    p = routing.probs_XE
    # The lower bound avoids log(0). Where p is 0, the product is 0 all the same.
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=-1)
    return _product(weight, entropy) / jnp.maximum(weight.sum(), 1.0)


def row_mean(
    routing: Routing,
    valid_BT: jax.Array,
    weight_B: jax.Array | None,
    statistic: Callable[[Routing, jax.Array], jax.Array],
) -> jax.Array:
    """Return `statistic(routing, valid_X)` over all B·T tokens, or averaged over the B rows.

    Args:
        weight_B: float, not negative. If given, the statistic is computed for every row and
            averaged with these weights; the result is 0 when all weights are 0.
    """
    if weight_B is None:
        return statistic(routing, valid_BT.reshape(-1))
    rows = jax.tree.map(lambda a: a.reshape(*valid_BT.shape, *a.shape[1:]), routing)
    value_B = jax.vmap(statistic)(rows, valid_BT)
    total = weight_B.sum()
    return _product(weight_B, value_B) / jnp.where(total > 0, total, 1.0)


def expert_load(routing: Routing, modality_X: jax.Array) -> jax.Array:
    """Count token slots per modality and expert: float32 [modalities, E].

    Padding is not counted: its number is −1, for which `one_hot` returns zeros.
    """
    num_experts = routing.probs_XE.shape[-1]
    to_XE = jax.nn.one_hot(routing.expert_XK, num_experts).sum(axis=1)
    return jax.nn.one_hot(modality_X, NUM_MODALITIES).T @ to_XE
