"""Multi-head attention with biases, for the encoders and the query connectors.

Parameters: `q_proj k_proj v_proj o_proj`, each `kernel [in, out]` and `bias [out]`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
from einops import rearrange

from unimoe_jax.nn.attention.attend import attend
from unimoe_jax.nn.kernels.splash_attention import attend_all, suits
from unimoe_jax.nn.linear import LayerOptions, Linear


def project_heads(
    x_BTD: jax.Array,
    features: int,
    num_heads: int,
    options: LayerOptions,
    use_bias: bool,
    name: str,
) -> jax.Array:
    """Apply linear layer `name` of the calling module and split its output into heads: [B,T,N,H].

    Args:
        features: N · H, the width of all heads together.

    Raises:
        ValueError: `num_heads` does not divide `features`.
    """
    if features % num_heads:
        raise ValueError(
            f"{name}: {features} features cannot be split into {num_heads} heads of equal width; "
            "choose a number of heads that divides the features"
        )
    linear = Linear(features, options, use_bias=use_bias, axes=("embed", "heads"), name=name)
    return rearrange(linear(x_BTD), "b t (n h) -> b t n h", n=num_heads)


def merge_heads(x_BTNH: jax.Array, features: int, options: LayerOptions, name: str) -> jax.Array:
    """Join the heads and apply output layer `name` of the calling module: [B,T,features]."""
    x_BTD = rearrange(x_BTNH, "b t n h -> b t (n h)")
    return Linear(features, options, use_bias=True, axes=("heads", "embed"), name=name)(x_BTD)


class MultiHeadAttention(nn.Module):
    """Attention of x to itself or to a memory (arXiv 1706.03762, section 3.2.2).

    Attributes:
        key_bias: whether the key projection has a bias. In Whisper it has none.
    """

    num_heads: int
    options: LayerOptions
    key_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        memory_BSD: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
    ) -> jax.Array:
        """Return the attended features, [B,T,D] like x.

        Args:
            x_BTD: the features that ask, of T positions.
            memory_BSD: the features that are attended to, of any width; None means x itself.
            mask_BTS: bool, True where the key is visible; None means that all keys are visible.
        """
        width, heads, options = x_BTD.shape[-1], self.num_heads, self.options
        memory_BSD = x_BTD if memory_BSD is None else memory_BSD
        q_BTNH = project_heads(x_BTD, width, heads, options, True, "q_proj")
        k_BSNH = project_heads(memory_BSD, width, heads, options, self.key_bias, "k_proj")
        v_BSNH = project_heads(memory_BSD, width, heads, options, True, "v_proj")
        scale = (width // heads) ** -0.5
        # The TPU kernel takes no mask here, and it pays only where queries and keys are many.
        positions = min(q_BTNH.shape[1], k_BSNH.shape[1])
        if mask_BTS is None and suits(options.attention, "all", positions):
            out_BTNH = attend_all(q_BTNH, k_BSNH, v_BSNH, scale=scale)
        else:
            out_BTNH = attend(q_BTNH, k_BSNH, v_BSNH, scale=scale, mask_BTS=mask_BTS)
        return merge_heads(out_BTNH, width, options, "o_proj")
