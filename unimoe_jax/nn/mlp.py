"""Dense feed-forward layers: `Mlp` for encoders and connectors, `SwiGLU` for the decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from unimoe_jax.nn.linear import LayerOptions, Linear


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return x · sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


# The exact GELU, x · Φ(x); jax.nn.gelu would use the tanh approximation by default.
gelu: Callable[[jax.Array], jax.Array] = partial(jax.nn.gelu, approximate=False)


class Mlp(nn.Module):
    """fc2(activation(fc1(x))) with biases; the output is as wide as x.

    Attributes:
        hidden: the width between the two layers.
    """

    hidden: int
    activation: Callable[[jax.Array], jax.Array]
    options: LayerOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, options = x.shape[-1], self.options
        h = Linear(self.hidden, options, use_bias=True, axes=("embed", "mlp"), name="fc1")(x)
        h = self.activation(h)
        return Linear(width, options, use_bias=True, axes=("mlp", "embed"), name="fc2")(h)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) without biases (arXiv 2002.05202, section 2).

    Attributes:
        hidden: the width of the gate and up projections.
    """

    hidden: int
    options: LayerOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, options = x.shape[-1], self.options
        gate = Linear(self.hidden, options, axes=("embed", "mlp"), name="gate_proj")(x)
        up = Linear(self.hidden, options, axes=("embed", "mlp"), name="up_proj")(x)
        h = jax.nn.silu(gate) * up
        return Linear(width, options, axes=("mlp", "embed"), name="down_proj")(h)
