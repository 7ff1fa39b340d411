"""The dtype in which generation holds each parameter."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from unimoe_jax.models.inference_decoder import held_dtype


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("decoder/run_0/block_0/moe/router/linear/kernel", "float32"),
        ("vision/connector/moe/router/linear/kernel", "float32"),
        ("decoder/final_norm/scale", "float32"),
        ("decoder/run_0/block_0/moe/experts/up_proj/kernel", "bfloat16"),
        ("vision/encoder/pre_norm/bias", "bfloat16"),
        ("embed/embedding", "bfloat16"),
    ],
)
def test_routers_and_scales_keep_float32(path: str, expected: str):
    assert held_dtype(path, jnp.bfloat16) == jnp.dtype(expected)
