"""The ring of keys and values gives the same results as attention over all tokens at once."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import relative_error
from unimoe_jax.nn.attention.attend import attend
from unimoe_jax.nn.attention.decode import KVCache, attend_one, visible, write

HEADS, KV_HEADS, SIZE, SLOTS = 4, 2, 3, 8


def tensors(tokens: int) -> tuple[Any, Any, Any]:
    """Return random queries, keys and values of two sequences as numpy arrays."""
    random = np.random.default_rng(0)
    q = random.standard_normal((2, tokens, HEADS, SIZE), np.float32)
    k, v = random.standard_normal((2, 2, tokens, KV_HEADS, SIZE), np.float32)
    return q, k, v


def empty() -> KVCache:
    """Return a cache without tokens. It is not zero, because invisible slots must not count."""
    k = jnp.full((2, KV_HEADS, SIZE, SLOTS), 7.0)
    return KVCache(k, jnp.full((2, KV_HEADS, SLOTS, SIZE), 9.0))


@pytest.mark.parametrize("first", [0, 5])
def test_token_by_token_equals_all_at_once(first: int):
    """This holds wherever in the ring a sequence begins; one that begins at 5 wraps around."""
    q, k, v = tensors(6)
    causal = jnp.tril(jnp.ones((6, 6), bool))[None]
    whole = attend(q, k, v, scale=0.7, mask_BTS=causal)
    cache = empty()
    for token in range(6):
        cursor = jnp.int32(first + token)
        cache = write(cache, k[:, token], v[:, token], cursor)
        seen = visible(cursor, jnp.full(2, token + 1), SLOTS)
        y = attend_one(q[:, token], cache, seen, scale=0.7)
        assert relative_error(y, whole[:, token]) < 1e-6, token


def test_the_oldest_token_is_overwritten_last():
    """A ring of S slots holds S tokens, and each row sees as many of the newest as it has."""
    seen = np.asarray(visible(jnp.int32(10), jnp.array([1, 3, 8]), SLOTS))
    assert np.flatnonzero(seen[0]).tolist() == [2]
    assert np.flatnonzero(seen[1]).tolist() == [0, 1, 2]
    assert seen[2].all()
