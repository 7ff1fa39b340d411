"""RMSNorm and LayerNorm with float32 statistics."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimoe_jax.nn.linear import LayerOptions, declare


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis (arXiv 1910.07467).

    The statistics are float32. The normalised value is cast to the compute dtype before the scale
    is applied, because LLaMA does the same.

    Attributes:
        eps: added to the mean square, so that a row of zeros divides by a positive number.
    """

    eps: float
    options: LayerOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = declare(self, "scale", nn.initializers.ones, (x.shape[-1],), (None,))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        x = x.astype(self.options.dtype)
        # The broadcast is explicit because the tests forbid implicit rank promotion.
        return x * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


class LayerNorm(nn.Module):
    """(x − mean) / std · scale + bias over the last axis, computed in float32 and cast at the end.

    Attributes:
        eps: added to the variance, so that a constant row divides by a positive number.
    """

    eps: float
    options: LayerOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = declare(self, "scale", nn.initializers.ones, (x.shape[-1],), (None,))
        bias = declare(self, "bias", nn.initializers.zeros, (x.shape[-1],), (None,))
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        # x is centred, so its mean square is the variance.
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        scale, bias = jnp.broadcast_to(scale, x.shape), jnp.broadcast_to(bias, x.shape)
        return (x * scale + bias).astype(self.options.dtype)
