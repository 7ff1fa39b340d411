"""Whisper's audio encoder (arXiv 2212.04356, section 2.2).

Parameters, with M mel bins, S = `max_positions` and L layers:

    conv1/{kernel [3·M, D], bias [D]}    rows ordered (tap, input channel)
    conv2/{kernel [3·D, D], bias [D]}    the same; stride 2
    position_embedding     [S, D]        initialised with sinusoids
    layers/attention_norm/{scale,bias}                       [L, D]
    layers/attention/{q,v,o}_proj/{kernel [L,D,D], bias [L,D]}
    layers/attention/k_proj/kernel       [L,D,D]             no bias
    layers/mlp_norm/{scale,bias}                             [L, D]
    layers/mlp/{fc1,fc2}/{kernel,bias}   [L,D,F] [L,F], [L,F,D] [L,D]
    final_norm/{scale,bias}              [D]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimoe_jax.config import WhisperConfig
from unimoe_jax.nn.attention.multihead import MultiHeadAttention
from unimoe_jax.nn.linear import LayerOptions, Linear, declare
from unimoe_jax.nn.mlp import Mlp, gelu
from unimoe_jax.nn.norm import LayerNorm
from unimoe_jax.nn.stack import scan_layers
from unimoe_jax.parallel.sharding import shard

CONV_TAPS = 3


def sinusoids(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """Initialise positions [S,D] with sines in the first half of D and cosines in the second.

    Wavelengths grow from 2π to 2π·10000. `key` is unused; it makes this function an initialiser.
    """
    length, width = shape
    half = width // 2
    rate = jnp.exp(-math.log(10000.0) / max(half - 1, 1) * jnp.arange(half))
    angle = jnp.arange(length)[:, None] * rate[None]
    table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
    # An odd width leaves one column, which is zero.
    return jnp.pad(table, ((0, 0), (0, width - 2 * half))).astype(dtype)


def windows(x_BTC: jax.Array, stride: int) -> jax.Array:
    """Concatenate the inputs at t−1, t and t+1 for every `stride`-th t: [B, ⌈T/stride⌉, 3·C].

    Inputs beyond the ends are zero. A matrix product with the result is a convolution with three
    taps. Example: one channel (1, 2, 3) with stride 2 gives the rows (0, 1, 2) and (2, 3, 0).
    """
    length = x_BTC.shape[1]
    padded = jnp.pad(x_BTC, ((0, 0), (1, 1), (0, 0)))
    taps = [padded[:, tap : tap + length : stride] for tap in range(CONV_TAPS)]
    return jnp.concatenate(taps, axis=-1)


class WhisperBlock(nn.Module):
    """Pre-LayerNorm block with self-attention to all positions; keys have no bias."""

    config: WhisperConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layer_input: None, shared: None) -> tuple[jax.Array, None]:
        config, options = self.config, self.options
        h_BTD = LayerNorm(config.norm_eps, options, name="attention_norm")(x_BTD)
        attention = MultiHeadAttention(config.num_heads, options, key_bias=False, name="attention")
        x_BTD = x_BTD + attention(h_BTD)
        h_BTD = LayerNorm(config.norm_eps, options, name="mlp_norm")(x_BTD)
        return x_BTD + Mlp(config.mlp_dim, gelu, options, name="mlp")(h_BTD), None


class WhisperEncoder(nn.Module):
    """Map log-mel chunks to the states after the final LayerNorm. Padding is not masked."""

    config: WhisperConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, log_mel_BMF: jax.Array) -> jax.Array:
        """Encode chunks.

        Args:
            log_mel_BMF: float [B, mel_bins, 2·max_positions].

        Returns:
            [B, max_positions, D] in the compute dtype.

        Raises:
            ValueError: the chunks do not have the configured shape.
        """
        config, options = self.config, self.options
        expected = (config.mel_bins, 2 * config.max_positions)
        if log_mel_BMF.shape[1:] != expected:
            raise ValueError(
                f"log-mel chunks of {log_mel_BMF.shape[1:]} mel bins and frames, but the encoder "
                f"takes {expected}"
            )

        # Two convolutions; the second one halves the number of frames.
        def conv(x_BTC: jax.Array, stride: int, name: str) -> jax.Array:
            linear = Linear(
                config.hidden_size, options, use_bias=True, axes=(None, "embed"), name=name
            )
            return gelu(linear(windows(x_BTC, stride)))

        x_BFD = conv(log_mel_BMF.astype(options.dtype).swapaxes(1, 2), 1, "conv1")
        x_BTD = conv(x_BFD, 2, "conv2")
        # Positions, then the layers.
        shape = (config.max_positions, config.hidden_size)
        position_TD = declare(self, "position_embedding", sinusoids, shape, (None, "embed"))
        x_BTD = shard(x_BTD + position_TD.astype(options.dtype)[None], "batch", None, None)

        layers = scan_layers(
            WhisperBlock, config.num_layers, config.remat, "layers", config=config, options=options
        )
        x_BTD, _ = layers(x_BTD, None, None)
        return LayerNorm(config.norm_eps, options, name="final_norm")(x_BTD)
