"""Logits -> tokens: greedy, or drawn with temperature, top-k and top-p; every row on its own."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Choice(NamedTuple):
    """Settings of B rows. temperature_B 0: greedy; top_k_B 0: off; seed_B uint32."""

    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array
    seed_B: jax.Array


def choose(
    logits_BV: jax.Array, choice: Choice, count_B: jax.Array, greedy_only: bool
) -> jax.Array:
    """int32 [B] tokens. `count_B` numbers each row's tokens: with its seed it is all the randomness
    there is. With `greedy_only` (static) nothing is sorted."""
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if greedy_only:
        return best_B
    drawn_B = _draw(logits_BV, choice, count_B)
    return jnp.where(choice.temperature_B > 0, drawn_B, best_B)


def _draw(logits_BV: jax.Array, choice: Choice, count_B: jax.Array) -> jax.Array:
    """Temperature, then the top k, then the smallest set of at least top_p probability (arXiv
    1904.09751, section 3.1), in the order and with the ties of transformers' logits processors."""
    vocabulary = logits_BV.shape[-1]
    temperature_B1 = jnp.where(choice.temperature_B > 0, choice.temperature_B, 1.0)[:, None]
    sorted_BV, token_BV = jax.lax.top_k(logits_BV, vocabulary)
    k_B = jnp.where(choice.top_k_B > 0, jnp.minimum(choice.top_k_B, vocabulary), vocabulary)
    last_B1 = jnp.take_along_axis(sorted_BV, k_B[:, None] - 1, axis=1)
    # From the best on down: however small the temperature, it is finite and alone at the top.
    scaled_BV = (sorted_BV - sorted_BV[:, :1]) / temperature_B1
    kept_BV = jnp.where(sorted_BV >= last_B1, scaled_BV, -jnp.inf)
    prob_BV = jax.nn.softmax(kept_BV, axis=-1)
    before_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV
    inside_BV = before_BV < choice.top_p_B[:, None]
    kept_BV = jnp.where(inside_BV, kept_BV, -jnp.inf)

    def noise(seed: jax.Array, count: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), (vocabulary,))

    # Noise belongs to ranks, so that a token's chance does not depend on the vocabulary's order.
    noisy_BV = kept_BV + jax.vmap(noise)(choice.seed_B, count_B)
    rank_B1 = jnp.argmax(noisy_BV, axis=-1)[:, None]
    return jnp.take_along_axis(token_BV, rank_B1, axis=1)[:, 0].astype(jnp.int32)
