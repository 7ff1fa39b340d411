"""Linear layers with exact GELU in between (LLaVA's `mlp{depth}x_gelu`, arXiv 2310.03744).

Parameters without experts: `fc1 … fc{depth}`, each with `kernel [in, out]` and `bias [out]`. With
experts: `moe/router/linear/kernel [in, E]` and `moe/experts/fc1 …`, each with a leading experts
axis.
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
    """Map [..., any width] to [..., features]; all hidden layers have `features` units."""

    depth: int
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(self.depth):
            if layer:
                x = gelu(x)
            # Alternate the logical axes, so that the outputs that one layer cuts over devices are
            # the inputs that the next layer cuts.
            axes = ("embed", "mlp") if layer % 2 == 0 else ("mlp", "embed")
            x = Linear(
                self.features, self.options, use_bias=True, axes=axes, name=f"fc{layer + 1}"
            )(x)
        return x


class MoEConnector(nn.Module):
    """Experts that each have the form of `MlpConnector` (arXiv 2405.05949, section 3.2)."""

    config: MlpConnectorConfig
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, x_BPD: jax.Array, rows: ImageRows) -> tuple[jax.Array, MoEAux]:
        """Route the tokens of each image to experts.

        Args:
            x_BPD: encoder states [B,P,any width].
            rows: the modality and weight of each of the B images in the router statistics.

        Returns:
            Soft tokens [B,P,features], and the router statistics with a leading layers axis of
            length 1, as for the modules that have several layers.
        """
        assert self.config.moe is not None
        form = MlpForm((self.features,) * self.config.depth, gelu)
        layer = MoE(self.config.moe, form, self.options, name="moe")
        modality_BP, valid_BP = rows.tokens(x_BPD.shape[1])
        y_BPD, aux = layer(x_BPD, modality_BP, valid_BP, rows.weight_B)
        return y_BPD, jax.tree.map(lambda a: a[None], aux)
