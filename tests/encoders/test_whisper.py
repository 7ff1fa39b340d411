"""Whisper encoder: shapes, the convolutions' reach, initial positions, low precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from unimoe_jax.config import WhisperConfig
from unimoe_jax.encoders.whisper import WhisperEncoder, sinusoids, windows
from unimoe_jax.nn.linear import LayerOptions

CONFIG = WhisperConfig(
    hidden_size=8, mlp_dim=16, num_layers=3, num_heads=2, mel_bins=5, max_positions=6
)


def test_shapes_parameters_and_low_precision():
    module = WhisperEncoder(CONFIG, LayerOptions())
    mel = jax.random.normal(jax.random.key(0), (2, 5, 12))
    variables = nn.unbox(jax.jit(module.init)(jax.random.key(1), mel))
    params = variables["params"]
    assert params["conv1"]["kernel"].shape == (15, 8)
    assert params["conv2"]["kernel"].shape == (24, 8)
    assert params["layers"]["mlp"]["fc1"]["kernel"].shape == (3, 8, 16)
    assert "bias" not in params["layers"]["attention"]["k_proj"]
    states = jax.jit(module.apply)(variables, mel)
    assert states.shape == (2, 6, 8)
    half = WhisperEncoder(CONFIG, LayerOptions(dtype=jnp.bfloat16))
    low = jax.jit(half.apply)(variables, mel)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), states, atol=0.06)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_product_with_windows_is_a_convolution(stride: int):
    x = jax.random.normal(jax.random.key(0), (1, 7, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 2, 4))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC"), precision="highest"
    )
    actual = jnp.matmul(windows(x, stride), kernel.reshape(6, 4), precision="highest")
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_positions_start_as_sinusoids():
    table = sinusoids(jax.random.key(0), (5, 6))
    rate = 10000.0 ** (-np.arange(3) / 2)
    np.testing.assert_allclose(table[3, :3], np.sin(3 * rate), atol=1e-6)
    np.testing.assert_allclose(table[3, 3:], np.cos(3 * rate), atol=1e-6)


def test_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 12\)"):
        WhisperEncoder(CONFIG, LayerOptions()).init(jax.random.key(0), jnp.zeros((1, 5, 10)))
