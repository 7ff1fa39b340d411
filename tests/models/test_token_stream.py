"""The gather of soft tokens: every row reads the table of its data shard; gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.models.token_stream import token_stream

ROWS, LENGTH, WIDTH, SOFT = 4, 5, 3, 6
RNG = np.random.default_rng(0)
TEXT = RNG.standard_normal((ROWS, LENGTH, WIDTH), np.float32)
SLOTS = np.array([[-1, 0, 1, -1, -1], [5, -1, -1, -1, 4], [-1, 0, 1, 2, -1], [-1, -1, -1, -1, 3]])


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_rows_read_the_table_of_their_shard(shards: int):
    soft = RNG.standard_normal((shards, SOFT, WIDTH), np.float32)
    out = token_stream(TEXT, jnp.asarray(soft), SLOTS)
    for b, t in np.ndindex(ROWS, LENGTH):
        slot = SLOTS[b, t]
        expected = TEXT[b, t] if slot < 0 else soft[b // (ROWS // shards), slot]
        np.testing.assert_array_equal(out[b, t], expected)


def test_gradient_reaches_each_used_soft_token_once():
    """The gradient of the sum with respect to a soft token counts how often it is used."""
    soft = jnp.zeros((2, SOFT, WIDTH))
    text, table = jax.grad(lambda t, s: jnp.sum(token_stream(t, s, SLOTS)), argnums=(0, 1))(
        jnp.asarray(TEXT), soft
    )
    used = np.zeros((2, SOFT))
    for b, t in np.argwhere(SLOTS >= 0):
        used[b // 2, SLOTS[b, t]] += 1
    assert used.max() == 1
    assert used.min() == 0
    np.testing.assert_array_equal(table, np.repeat(used[..., None], WIDTH, axis=-1))
    np.testing.assert_array_equal(text, np.repeat((SLOTS < 0)[..., None], WIDTH, axis=-1))


def test_without_soft_tokens_the_text_stays():
    assert token_stream(TEXT, None, np.full((ROWS, LENGTH), -1)) is TEXT


def test_the_stream_has_the_dtype_of_the_text():
    soft = jnp.ones((1, SOFT, WIDTH), jnp.float32)
    assert token_stream(jnp.asarray(TEXT, jnp.bfloat16), soft, SLOTS).dtype == jnp.bfloat16
