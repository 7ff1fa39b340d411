"""The ring of keys and values: what is seen, in which slots, against attention over all tokens."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import relative_error
from unimoe_jax.nn.attention.attend import attend
from unimoe_jax.nn.attention.decode import KVCache, attend_one, visible, write

HEADS, KV_HEADS, SIZE, SLOTS = 4, 2, 3, 8


def tensors(tokens: int):
    random = np.random.default_rng(0)
    q = random.standard_normal((2, tokens, HEADS, SIZE), np.float32)
    k, v = random.standard_normal((2, 2, tokens, KV_HEADS, SIZE), np.float32)
    return q, k, v


def empty() -> KVCache:
    # Not zero: what is not visible must not count.
    lead = (2, KV_HEADS)
    return KVCache(jnp.full((*lead, SIZE, SLOTS), 7.0), jnp.full((*lead, SLOTS, SIZE), 9.0))


@pytest.mark.parametrize("first", [0, 5])
def test_token_by_token_equals_all_at_once(first: int):
    """Wherever in the ring a sequence begins."""
    q, k, v = tensors(6)
    causal = np.tril(np.ones((6, 6), bool))[None]
    whole = attend(q, k, v, scale=0.7, mask_BTS=causal)
    cache = empty()
    for at in range(6):
        cursor = jnp.int32(first + at)
        cache = write(cache, k[:, at], v[:, at], cursor)
        seen = visible(cursor, jnp.full(2, at + 1), SLOTS)
        y = attend_one(q[:, at], cache, seen, scale=0.7)
        assert relative_error(y, whole[:, at]) < 1e-6, at


def test_the_oldest_token_is_overwritten_last():
    """S tokens fit; each row sees its own number of them, newest first."""
    seen = np.asarray(visible(jnp.int32(10), jnp.array([1, 3, 8]), SLOTS))
    assert np.flatnonzero(seen[0]).tolist() == [2]
    assert np.flatnonzero(seen[1]).tolist() == [0, 1, 2]
    assert seen[2].all()
