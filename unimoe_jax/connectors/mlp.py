"""Linear layers with exact GELU in between (LLaVA's `mlp{depth}x_gelu`, arXiv 2310.03744).

Parameters: `fc1 … fc{depth}`, each `kernel [in, out]`, `bias [out]`; with experts
`moe/router/linear/kernel [in, E]` and `moe/experts/fc1 …`, each with a leading experts axis.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from unimoe_jax.config import MlpConnectorConfig
from unimoe_jax.nn.linear import LayerOptions, Linear
from unimoe_jax.nn.mlp import gelu
from unimoe_jax.nn.moe.experts import MlpForm
from unimoe_jax.nn.moe.layer import ImageRows, MoE, MoEAux


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


class MoEConnector(nn.Module):
    """Experts of `MlpConnector`'s form in its place (arXiv 2405.05949, section 3.2)."""

    config: MlpConnectorConfig
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, x_BPD: jax.Array, rows: ImageRows) -> tuple[jax.Array, MoEAux]:
        """[B,P,any width] -> ([B,P,features], router statistics over the rows, layers axis 1)."""
        form = MlpForm((self.features,) * self.config.depth, gelu)
        layer = MoE(self.config.moe, form, self.options, name="moe")
        y_BPD, aux = layer(x_BPD, *rows.tokens(x_BPD.shape[1]), rows.weight_B)
        return y_BPD, jax.tree.map(lambda a: a[None], aux)
