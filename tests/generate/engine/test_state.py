"""The examples in the docstrings of `insert` and `grow`: where tokens are in a ring of slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.generate.engine.state import (
    NO_TOKEN,
    State,
    empty_new_rows,
    empty_rows,
    grow,
    insert,
)
from unimoe_jax.nn.attention.decode import KVCache


def cache_of(tokens: list[int]) -> KVCache:
    """A cache of one row, one head and head size 1, which holds one number per token."""
    values = jnp.array(tokens, jnp.float32)
    return KVCache(values.reshape(1, 1, 1, -1), values.reshape(1, 1, -1, 1))


def tokens_in(cache: KVCache) -> list[int]:
    np.testing.assert_array_equal(cache.k.ravel(), cache.v.ravel())
    return cache.k.ravel().astype(int).tolist()


@pytest.mark.parametrize(
    ("cursor", "ring"),
    [
        (5, [0, 0, 1, 2, 3, 0, 0, 0]),
        (1, [3, 0, 0, 0, 0, 0, 1, 2]),
        (9, [3, 0, 0, 0, 0, 0, 1, 2]),  # the cursor counts on behind the end of the ring
    ],
)
def test_a_prompt_ends_just_before_the_cursor(cursor, ring):
    state = State((cache_of([0] * 8),), jnp.int32(cursor), empty_rows(1))
    new = empty_new_rows(2)
    new.length_R[0], new.limit_R[0] = 3, 10
    new = jax.tree.map(jnp.asarray, new)
    # The prefill program has two rows, and the prompt in the first of them is padded to 4.
    prefilled = jax.tree.map(lambda a: jnp.concatenate([a, 9 + a]), cache_of([1, 2, 3, 0]))
    logits = jnp.array([[0.0, 7.0, 3.0]] * 2)
    state, token_R = insert(
        state, (prefilled,), logits, new, jnp.int32(1), eos=(2,), greedy_only=True
    )
    assert tokens_in(state.caches[0]) == ring
    assert token_R.tolist() == [1, NO_TOKEN]
    assert state.rows.active_B.tolist() == [True]
    assert (state.rows.length_B.tolist(), state.rows.count_B.tolist()) == ([3], [1])


def test_a_longer_ring_begins_with_the_oldest_token():
    state = State((cache_of([4, 5, 2, 3]),), jnp.int32(6), empty_rows(1))
    state = grow(state, slots=8)
    assert tokens_in(state.caches[0]) == [2, 3, 4, 5, 0, 0, 0, 0]
    assert state.cursor == 4
