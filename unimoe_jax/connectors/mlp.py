"""Linear layers with exact GELU in between (LLaVA's `mlp{depth}x_gelu`, arXiv 2310.03744).

Parameters: `fc1 … fc{depth}`, each `kernel [in, out]`, `bias [out]`.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from unimoe_jax.nn.linear import LayerOptions, Linear
from unimoe_jax.nn.mlp import gelu


class MlpConnector(nn.Module):
    """[..., any width] -> [..., features]; all hidden layers have `features` units."""

    depth: int
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(self.depth):
            if layer:
                x = gelu(x)
            axes = ("embed", "mlp") if layer % 2 == 0 else ("mlp", "embed")
            x = Linear(
                self.features, self.options, use_bias=True, axes=axes, name=f"fc{layer + 1}"
            )(x)
        return x
