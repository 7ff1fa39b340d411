"""Drawn tokens: their distribution, and the tokens that top-k and top-p exclude."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.generate.engine.sampling import RowSampling, choose_tokens

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
DRAWS = 4000


def rows_with(temperature: float, top_p: float, top_k: int, seeds: jax.Array) -> RowSampling:
    """The same settings for all rows, with a seed for each."""
    rows = len(seeds)
    return RowSampling(
        temperature_B=jnp.full(rows, temperature, jnp.float32),
        top_p_B=jnp.full(rows, top_p, jnp.float32),
        top_k_B=jnp.full(rows, top_k, jnp.int32),
        seed_B=seeds,
    )


def draw(temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """The share of draws that gave each token, over many seeds."""
    seeds = jnp.arange(DRAWS, dtype=jnp.uint32)
    sampling = rows_with(temperature, top_p, top_k, seeds)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, len(LOGITS)))
    choose = jax.jit(choose_tokens, static_argnums=3)
    tokens = choose(logits, sampling, jnp.zeros(DRAWS, jnp.int32), False)
    return np.bincount(np.asarray(tokens), minlength=len(LOGITS)) / DRAWS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((1.0, 1.0, 0), [0.05, 0.4, 0.1, 0.25, 0.2]),
        ((1.0, 1.0, 2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        # 0.4 + 0.25 is below 0.7, so the token with 0.2 still belongs to the set.
        ((1.0, 0.7, 0), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ((1.0, 0.3, 0), [0, 1, 0, 0, 0]),
        # top-p applies to the tokens that top-k has left: 0.4 of 0.65 is above 0.6.
        ((1.0, 0.6, 2), [0, 1, 0, 0, 0]),
        ((0.5, 1.0, 0), np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()),
        ((0.0, 1.0, 0), [0, 1, 0, 0, 0]),
    ],
)
def test_distribution(settings, expected):
    # The tolerance is five standard deviations of a share of 0.4 in 4000 draws.
    np.testing.assert_allclose(draw(*settings), expected, atol=0.04)
    assert not np.any(draw(*settings)[np.asarray(expected) == 0])


@pytest.mark.parametrize("temperature", [1e-45, 2e-38, 1e-30, 1e-3, 1e38])
def test_extreme_temperatures(temperature):
    """A tiny temperature gives the best token; a huge one gives the best two equally often."""
    logits = np.array([-3, 8, 9.5, -80, 9, 0], np.float32)
    seeds = jnp.arange(64, dtype=jnp.uint32)
    sampling = rows_with(temperature, 1.0, 2, seeds)
    rows = jnp.broadcast_to(logits, (64, 6))
    tokens = choose_tokens(rows, sampling, jnp.zeros(64, jnp.int32), False)
    assert set(np.asarray(tokens).tolist()) == ({2} if temperature < 1 else {2, 4})


def test_top_k_keeps_all_tokens_as_likely_as_the_last_of_the_k():
    logits = jnp.broadcast_to(jnp.asarray([1.0, 2.0, 1.0, 0.0, 1.0]), (200, 5))
    sampling = rows_with(1.0, 1.0, 2, jnp.arange(200, dtype=jnp.uint32))
    tokens = choose_tokens(logits, sampling, jnp.zeros(200, jnp.int32), False)
    assert set(np.asarray(tokens).tolist()) == {0, 1, 2, 4}


def test_a_draw_depends_on_seed_and_count_alone():
    sampling = rows_with(1.0, 1.0, 0, jnp.ones(1, jnp.uint32))

    def drawn() -> list[int]:
        tokens = (choose_tokens(LOGITS[None], sampling, jnp.full(1, n), False) for n in range(30))
        return [int(token[0]) for token in tokens]

    first = drawn()
    assert len(set(first)) > 2
    assert drawn() == first
