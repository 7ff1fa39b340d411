"""Drawn tokens: their distribution, and what settings cut away."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.generate.engine.sampling import RowSampling, choose_tokens

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
DRAWS = 4000


def draw(temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """Frequencies of tokens over many seeds."""
    seeds = jnp.arange(DRAWS, dtype=jnp.uint32)
    full = [jnp.full(DRAWS, value) for value in (temperature, top_p)]
    choice = RowSampling(*full, jnp.full(DRAWS, top_k, jnp.int32), seeds)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, len(LOGITS)))
    tokens = jax.jit(choose_tokens, static_argnums=3)(logits, choice, jnp.zeros(DRAWS, jnp.int32), False)
    return np.bincount(np.asarray(tokens), minlength=len(LOGITS)) / DRAWS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((1.0, 1.0, 0), [0.05, 0.4, 0.1, 0.25, 0.2]),
        ((1.0, 1.0, 2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        # 0.4 + 0.25 is below 0.7: the next one is the last that belongs to it.
        ((1.0, 0.7, 0), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ((1.0, 0.3, 0), [0, 1, 0, 0, 0]),
        # top-p is taken of what top-k left.
        ((1.0, 0.6, 2), [0, 1, 0, 0, 0]),
        ((0.5, 1.0, 0), np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()),
        ((0.0, 1.0, 0), [0, 1, 0, 0, 0]),
    ],
)
def test_distribution(settings, expected):
    # Five standard deviations of a share of 0.4 among 4000 draws.
    np.testing.assert_allclose(draw(*settings), expected, atol=0.04)
    assert not np.any(draw(*settings)[np.asarray(expected) == 0])


@pytest.mark.parametrize("temperature", [1e-45, 2e-38, 1e-30, 1e-3, 1e38])
def test_extreme_temperatures(temperature):
    """The best token where it is next to none, the best two alike where it is next to infinite."""
    logits = np.array([-3, 8, 9.5, -80, 9, 0], np.float32)
    seeds = jnp.arange(64, dtype=jnp.uint32)
    full = [jnp.full(64, value, jnp.float32) for value in (temperature, 1.0)]
    choice = RowSampling(*full, jnp.full(64, 2, jnp.int32), seeds)
    tokens = choose_tokens(jnp.broadcast_to(logits, (64, 6)), choice, jnp.zeros(64, jnp.int32), False)
    assert set(np.asarray(tokens).tolist()) == ({2} if temperature < 1 else {2, 4})


def test_tokens_as_likely_as_the_last_of_the_best_are_among_them():
    logits = jnp.broadcast_to(jnp.asarray([1.0, 2.0, 1.0, 0.0, 1.0]), (200, 5))
    full = [jnp.full(200, value, jnp.float32) for value in (1.0, 1.0)]
    choice = RowSampling(*full, jnp.full(200, 2, jnp.int32), jnp.arange(200, dtype=jnp.uint32))
    tokens = choose_tokens(logits, choice, jnp.zeros(200, jnp.int32), False)
    assert set(np.asarray(tokens).tolist()) == {0, 1, 2, 4}


def test_the_number_of_the_token_is_part_of_the_draw():
    one = RowSampling(
        *(jnp.full(1, v) for v in (1.0, 1.0)), jnp.zeros(1, jnp.int32), jnp.ones(1, "uint32")
    )
    drawn = [int(choose_tokens(LOGITS[None], one, jnp.full(1, n), False)[0]) for n in range(30)]
    assert len(set(drawn)) > 2
    again = [int(choose_tokens(LOGITS[None], one, jnp.full(1, n), False)[0]) for n in range(30)]
    assert drawn == again
