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
    or with E experts, layers/moe/router/linear/kernel [L',D,E], layers/moe/experts/fc1/kernel
    [L',E,D,F] and so on
    unread_layers/…                          the same for the layers after the selected hidden state

Released checkpoints hold two things more. `post_layernorm` is left out because no released
multimodal model reads it. The layers after the selected hidden state are left out unless
`config.unread_layers` is `keep`. Kept layers contribute nothing but their routers' statistics, so
the compiler removes them from a program that does not use these statistics.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from unimoe_jax.config import ClipConfig
from unimoe_jax.config.media import MODALITY
from unimoe_jax.nn.attention.multihead import MultiHeadAttention
from unimoe_jax.nn.linear import LayerOptions, Linear, declare
from unimoe_jax.nn.mlp import Mlp, gelu, quick_gelu
from unimoe_jax.nn.moe.experts import MlpForm
from unimoe_jax.nn.moe.layer import ImageRows, MoE, MoEAux
from unimoe_jax.nn.norm import LayerNorm
from unimoe_jax.nn.stack import scan_layers
from unimoe_jax.parallel.sharding import shard

embedding_init = nn.initializers.normal(0.02)
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class ClipBlock(nn.Module):
    """Pre-LayerNorm block: x += attention(norm(x)); x += mlp or experts(norm(x)).

    Attributes:
        read: False if only the router's statistics of this block are used, and not its output.
    """

    config: ClipConfig
    options: LayerOptions
    read: bool = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, layer_input: None, rows: ImageRows
    ) -> tuple[jax.Array, MoEAux | None]:
        config, options = self.config, self.options
        activation = ACTIVATIONS[config.activation]
        h_BTD = LayerNorm(config.norm_eps, options, name="attention_norm")(x_BTD)
        x_BTD = x_BTD + MultiHeadAttention(config.num_heads, options, name="attention")(h_BTD)
        h_BTD = LayerNorm(config.norm_eps, options, name="mlp_norm")(x_BTD)
        if config.moe is None:
            return x_BTD + Mlp(config.mlp_dim, activation, options, name="mlp")(h_BTD), None
        form = MlpForm((config.mlp_dim, config.hidden_size), activation)
        moe = MoE(config.moe, form, options, name="moe")
        h_BTD, aux = moe(h_BTD, *rows.tokens(h_BTD.shape[1]), rows.weight_B)
        # Stop the gradient of a block whose output is not read. Inside a scan its experts would get
        # an explicit gradient of zero, and their backward pass would run for nothing.
        if not self.read:
            h_BTD = jax.lax.stop_gradient(h_BTD)
        return x_BTD + h_BTD, aux


class ClipEncoder(nn.Module):
    """Patch features from an inner layer: `hidden_states[select_layer]` without the class token."""

    config: ClipConfig
    options: LayerOptions

    def __call__(
        self, image_BHWC: jax.Array, rows: ImageRows | None = None
    ) -> tuple[jax.Array, MoEAux | None]:
        """Encode normalised images.

        Args:
            image_BHWC: float [B, image_size, image_size, 3].
            rows: the modality and weight of each image in the router statistics; None: all images
                count the same.

        Returns:
            The patch states [B,P,D] in the compute dtype, in row-major order, and the statistics of
            the experts' routers with a leading layers axis, unread layers last (None without
            experts).

        Raises:
            ValueError: the images do not have the configured size.
        """
        hidden_BTD, aux = self.hidden_state(image_BHWC, rows)
        return hidden_BTD[:, 1:], aux

    @nn.compact
    def hidden_state(
        self, image_BHWC: jax.Array, rows: ImageRows | None = None
    ) -> tuple[jax.Array, MoEAux | None]:
        """Do the same as the call, but return [B,1+P,D] with the class token first."""
        config, options = self.config, self.options
        side, patch, width = config.image_size, config.patch_size, config.hidden_size
        if image_BHWC.shape[1:] != (side, side, 3):
            raise ValueError(
                f"images {image_BHWC.shape[1:]}, but the encoder takes {side}x{side}x3"
            )
        # Embed the patches; pixels beyond the last whole patch are dropped, as in a convolution.
        used = side // patch * patch
        patches_BPC = rearrange(
            image_BHWC[:, :used, :used],
            "b (r p) (s q) c -> b (r s) (p q c)",
            p=patch,
            q=patch,
        )
        embed = Linear(width, options, axes=(None, "embed"), name="patch_embedding")
        x_BPD = embed(patches_BPC)

        # Put the class token in front and add the positions.
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
        if rows is None:
            images = x_BTD.shape[:1]
            rows = ImageRows(
                jnp.full(images, MODALITY["image"], jnp.int32), jnp.ones(images, jnp.float32)
            )
        # The unread layers continue from the selected state, and only their statistics are kept.
        x_BTD, used_aux = self.stack(x_BTD, rows, "layers", config.used_layers)
        _, unread_aux = self.stack(x_BTD, rows, "unread_layers", config.kept_unread)
        present = [aux for aux in (used_aux, unread_aux) if aux is not None]
        joined = jax.tree.map(lambda *a: jnp.concatenate(a), *present) if present else None
        return x_BTD, joined

    def stack(
        self, x_BTD: jax.Array, rows: ImageRows, name: str, length: int
    ) -> tuple[jax.Array, MoEAux | None]:
        """Run `length` layers declared under `name`: (hidden states, their routers' statistics)."""
        if not length:
            return x_BTD, None
        # A layer's output is read by the next layer, so only a single unread layer is not read.
        # With several of them the scan runs the same block for all, the last one included.
        read = name == "layers" or length > 1
        fields = {"config": self.config, "options": self.options, "read": read}
        return scan_layers(ClipBlock, length, self.config.remat, name, **fields)(x_BTD, None, rows)
