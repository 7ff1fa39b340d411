"""CLIP vision transformer (arXiv 2103.00020, section 2.4; ViT-L/14-336 in the released models).

Parameters, with p the patch size, P patches and L' = `config.used_layers`:

    patch_embedding/kernel      [p·p·3, D]   rows ordered (patch row, column, channel); no bias
    class_embedding             [D]
    position_embedding          [1+P, D]     row 0 belongs to the class token
    pre_norm/{scale,bias}       [D]
    layers/attention_norm/{scale,bias}                       [L', D]
    layers/attention/{q,k,v,o}_proj/{kernel [L',D,D], bias [L',D]}
    layers/mlp_norm/{scale,bias}                             [L', D]
    layers/mlp/{fc1,fc2}/{kernel,bias}       [L',D,F] [L',F], [L',F,D] [L',D]

Released checkpoints hold more: the layers after the selected one and `post_layernorm`, which no
released multimodal model reads. They are not declared here.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from unimoe_jax.config import ClipConfig
from unimoe_jax.nn.linear import LayerOptions, Linear, declare
from unimoe_jax.nn.mlp import Mlp, quick_gelu
from unimoe_jax.nn.multihead import MultiHeadAttention
from unimoe_jax.nn.norm import LayerNorm
from unimoe_jax.nn.stack import scan_layers
from unimoe_jax.sharding import shard

embedding_init = nn.initializers.normal(0.02)


class ClipBlock(nn.Module):
    """Pre-LayerNorm block: x += attention(norm(x)); x += mlp(norm(x))."""

    config: ClipConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layer_input: None, shared: None) -> tuple[jax.Array, None]:
        config, options = self.config, self.options
        h_BTD = LayerNorm(config.norm_eps, options, name="attention_norm")(x_BTD)
        x_BTD = x_BTD + MultiHeadAttention(config.num_heads, options, name="attention")(h_BTD)
        h_BTD = LayerNorm(config.norm_eps, options, name="mlp_norm")(x_BTD)
        h_BTD, aux = self.feed_forward(h_BTD)
        return x_BTD + h_BTD, aux

    def feed_forward(self, h_BTD: jax.Array) -> tuple[jax.Array, None]:
        """The layer that experts may take the place of; its second result is theirs."""
        return Mlp(self.config.mlp_dim, quick_gelu, self.options, name="mlp")(h_BTD), None


class ClipEncoder(nn.Module):
    """Patch features from an inner layer: `hidden_states[select_layer]` without the class token."""

    config: ClipConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        """Encode normalised images.

        Args:
            image_BHWC: float [B, image_size, image_size, 3].

        Returns:
            [B,P,D] in the compute dtype, patches in row-major order.

        Raises:
            ValueError: the images do not have the configured size.
        """
        config, options = self.config, self.options
        side, patch, width = config.image_size, config.patch_size, config.hidden_size
        if image_BHWC.shape[1:] != (side, side, 3):
            raise ValueError(
                f"images {image_BHWC.shape[1:]}, but the encoder takes {side}x{side}x3"
            )
        used = side // patch * patch
        patches_BPC = rearrange(
            image_BHWC[:, :used, :used],
            "b (r p) (s q) c -> b (r s) (p q c)",
            p=patch,
            q=patch,
        )
        embed = Linear(width, options, axes=(None, "embed"), name="patch_embedding")
        x_BPD = embed(patches_BPC)

        class_D = declare(self, "class_embedding", embedding_init, (width,), ("embed",))
        shape = (1 + config.num_patches, width)
        position_TD = declare(self, "position_embedding", embedding_init, shape, (None, "embed"))
        class_B1D = jnp.broadcast_to(
            class_D.astype(options.dtype)[None, None], (x_BPD.shape[0], 1, width)
        )
        x_BTD = (
            jnp.concatenate([class_B1D, x_BPD], axis=1) + position_TD.astype(options.dtype)[None]
        )

        x_BTD = LayerNorm(config.norm_eps, options, name="pre_norm")(x_BTD)
        x_BTD = shard(x_BTD, "batch", None, None)
        if config.used_layers:
            layers = scan_layers(
                ClipBlock,
                config.used_layers,
                config.remat,
                "layers",
                config=config,
                options=options,
            )
            x_BTD, _ = layers(x_BTD, None, None)
        return x_BTD[:, 1:]
