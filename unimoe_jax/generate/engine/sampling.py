"""Logits -> the next token of every row: greedy, or drawn with temperature, top-k and top-p.

Every row has its settings, and no row influences another.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RowSampling(NamedTuple):
    """Sampling settings of B rows.

    temperature_B float32: 0 is greedy. top_p_B float32. top_k_B int32: 0 is off. seed_B uint32.
    """

    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array
    seed_B: jax.Array


def choose_tokens(
    logits_BV: jax.Array, sampling: RowSampling, count_B: jax.Array, greedy_only: bool
) -> jax.Array:
    """The next token of every row, int32 [B].

    count_B: int32, how many tokens the row has generated. The random numbers of a draw depend on
    the row's seed and this count alone. greedy_only: static; True leaves the sort out of the
    program, and then no row may sample.
    """
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if greedy_only:
        return best_B
    drawn_B = _draw(logits_BV, sampling, count_B)
    return jnp.where(sampling.temperature_B > 0, drawn_B, best_B)


def _draw(logits_BV: jax.Array, sampling: RowSampling, count_B: jax.Array) -> jax.Array:
    """A token drawn for every row, int32 [B].

    Temperature first, then the k best tokens, then the smallest set of at least top_p probability
    (arXiv 1904.09751, section 3.1), in the order and with the ties of transformers' logits
    processors. Example: top_p = 0.7 of probabilities 0.4, 0.25, 0.2, 0.15 keeps the first three,
    because 0.4 + 0.25 is below 0.7.
    """
    vocabulary = logits_BV.shape[-1]
    # Greedy rows are drawn as well and then ignored; any temperature above 0 will do for them.
    temperature_B1 = jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1.0)[:, None]
    # Sort by logit, the best first.
    sorted_BV, token_BV = jax.lax.top_k(logits_BV, vocabulary)
    # Keep the k best and every token as likely as the k-th.
    k_B = jnp.where(sampling.top_k_B > 0, jnp.minimum(sampling.top_k_B, vocabulary), vocabulary)
    last_B1 = jnp.take_along_axis(sorted_BV, k_B[:, None] - 1, axis=1)
    # Subtract the maximum before dividing by the temperature, so that a tiny temperature cannot
    # overflow.
    scaled_BV = (sorted_BV - sorted_BV[:, :1]) / temperature_B1
    kept_BV = jnp.where(sorted_BV >= last_B1, scaled_BV, -jnp.inf)
    # Keep a token if the better ones together have less than top_p.
    prob_BV = jax.nn.softmax(kept_BV, axis=-1)
    before_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV
    kept_BV = jnp.where(before_BV < sampling.top_p_B[:, None], kept_BV, -jnp.inf)

    def noise(seed: jax.Array, count: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), (vocabulary,))

    # The maximum of logits plus Gumbel noise is a draw from their softmax. The noise belongs to
    # ranks, not to token ids, so a draw does not depend on the order of the vocabulary.
    noisy_BV = kept_BV + jax.vmap(noise)(sampling.seed_B, count_B)
    rank_B1 = jnp.argmax(noisy_BV, axis=-1)[:, None]
    return jnp.take_along_axis(token_BV, rank_B1, axis=1)[:, 0].astype(jnp.int32)
