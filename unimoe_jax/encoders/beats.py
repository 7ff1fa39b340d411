"""BEATs audio encoder (arXiv 2212.09058; the position bias is WavLM's, arXiv 2110.13900).

Parameters, with p the patch size, E = `embed_size`, K conv taps in g groups, N heads of H = D/N:

    patch_embedding/kernel        [p·p, E]     rows ordered (frame, mel bin); no bias
    patch_norm/{scale,bias}       [E]
    embed_proj/{kernel [E,D], bias [D]}       only where E differs from D, as released
    conv_position/weight_v        [K, D/g, D]  (tap, input channel of the group, output channel)
    conv_position/weight_g        [K]
    conv_position/bias            [D]
    embed_norm/{scale,bias}       [D]
    relative_attention_bias       [num_buckets, N]     one table for all layers
    layers/attention/{q,k,v,o}_proj/{kernel [L,D,D], bias [L,D]}
    layers/attention/grep_linear/{kernel [L,H,8], bias [L,8]}
    layers/attention/grep_a       [L, N]
    layers/attention_norm/{scale,bias}                       [L, D]
    layers/mlp/{fc1,fc2}/{kernel,bias}         [L,D,F] [L,F], [L,F,D] [L,D]
    layers/mlp_norm/{scale,bias}                             [L, D]
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from unimoe_jax.config import BeatsConfig
from unimoe_jax.nn.attention.attend import attend
from unimoe_jax.nn.attention.multihead import merge_heads, project_heads
from unimoe_jax.nn.linear import LayerOptions, Linear, declare
from unimoe_jax.nn.mlp import Mlp, gelu
from unimoe_jax.nn.norm import LayerNorm
from unimoe_jax.nn.stack import scan_layers
from unimoe_jax.parallel.sharding import shard

QUERY_CHUNK = 256
GATES, GATE_TERMS = 2, 4


def visible_tokens(
    length_B: jax.Array, num_samples: int, num_frames: int, num_tokens: int
) -> jax.Array:
    """Which tokens count for `length_B` valid samples at the start of each chunk: bool [B,T].

    Samples are shared out evenly over frames and frames over tokens, remainders dropped at the end,
    and a share is masked if all of it is padding. Padding is a suffix, so its first sample decides.
    This is coarser in time than the tokens are (a token spans p frames and p mel bins, and the
    tokens of one time step are consecutive), but it is how the released encoder was trained.

    Raises:
        ValueError: more tokens than frames or more frames than samples, so nothing to share out.
    """
    if not num_tokens <= num_frames <= num_samples:
        raise ValueError(
            f"{num_tokens} tokens of {num_frames} frames of {num_samples} samples: each must have "
            f"at least one of the next"
        )
    samples_per_token = (num_samples // num_frames) * (num_frames // num_tokens)
    start_T = jnp.arange(num_tokens) * samples_per_token
    return start_T[None] < length_B[:, None]


def relative_buckets(offset: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of offset = key − query: exact up to a quarter of the buckets, then logarithmic.

    Half of the buckets are for keys after the query (arXiv 1910.10683, section 2.1, as in T5).
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    far = exact + (ratio / math.log(max_distance / exact) * (half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return np.where(offset > 0, half, 0) + bucket


def relative_bias(table_RN: jax.Array, length: int, max_distance: int) -> jax.Array:
    """Bias of every pair, [N,T,T] (query, key), from the table of buckets.

    The bias depends on key − query alone. 2T values in cyclic order, repeated T times and read in
    rows of 2T − 1, move by one place per row: every pair without a gather of T² elements.
    """
    cyclic = np.arange(2 * length)
    offset = np.where(cyclic < length, cyclic, cyclic - 2 * length)
    values_NC = table_RN[relative_buckets(offset, table_RN.shape[0], max_distance)].T
    heads = values_NC.shape[0]
    repeated = jnp.broadcast_to(values_NC[:, None], (heads, length, 2 * length))
    rows = repeated.reshape(heads, -1)[:, : length * (2 * length - 1)]
    return rows.reshape(heads, length, 2 * length - 1)[:, :, :length]


def attend_biased(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    gate_BNT: jax.Array,
    bias_NTS: jax.Array,
    visible_BS: jax.Array,
) -> jax.Array:
    """Attention with bias gate · bias, query chunk by chunk: [B,N,T,S] is never whole in memory."""
    length, scale = q_BTNH.shape[1], q_BTNH.shape[-1] ** -0.5
    mask_BTS = visible_BS[:, None]

    @jax.checkpoint
    def one(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, gate, bias = chunk
        bias_BNTS = gate[..., None] * bias[None]
        return attend(q, k_BSNH, v_BSNH, scale=scale, mask_BTS=mask_BTS, bias_BNTS=bias_BNTS)

    if length <= QUERY_CHUNK:
        return one((q_BTNH, gate_BNT, bias_NTS))

    def cut(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, -length % QUERY_CHUNK if dim == axis else 0) for dim in range(x.ndim)]
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], -1, QUERY_CHUNK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    out = jax.lax.map(one, (cut(q_BTNH, 1), cut(gate_BNT, 2), cut(bias_NTS, 1)))
    return rearrange(out, "c b t n h -> b (c t) n h")[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def grouped_conv(x_BTD: jax.Array, w_KID: jax.Array, groups: int) -> jax.Array:
    """Convolution over time within each of `groups` of channels, as long as x; I = D / groups.

    The gradient of the weights is one matrix product per tap. XLA's own is a convolution that its
    partitioner adds up over devices that hold the same rows: twice the gradient where `tensor` has
    two. On a CPU it takes seventy times as long as the forward pass, besides.
    """
    taps = w_KID.shape[0]
    return jax.lax.conv_general_dilated(
        x_BTD,
        w_KID,
        window_strides=(1,),
        padding=[_margins(taps)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


def _margins(taps: int) -> tuple[int, int]:
    return taps // 2, (taps - 1) // 2


def _grouped_conv_fwd(x_BTD: jax.Array, w_KID: jax.Array, groups: int):
    return grouped_conv(x_BTD, w_KID, groups), (x_BTD, w_KID)


def _grouped_conv_bwd(groups: int, kept: tuple[jax.Array, jax.Array], dy_BTD: jax.Array):
    x_BTD, w_KID = kept
    _, pull = jax.vjp(lambda x: grouped_conv.fun(x, w_KID, groups), x_BTD)
    taps, length = w_KID.shape[0], x_BTD.shape[1]
    padded = jnp.pad(x_BTD, ((0, 0), _margins(taps), (0, 0)))
    dy_BTGO = rearrange(dy_BTD, "b t (g o) -> b t g o", g=groups)

    def tap(at: jax.Array) -> jax.Array:
        seen = jax.lax.dynamic_slice_in_dim(padded, at, length, axis=1)
        seen_BTGI = rearrange(seen, "b t (g i) -> b t g i", g=groups)
        f32 = jnp.float32
        dw = jnp.einsum("btgi,btgo->igo", seen_BTGI, dy_BTGO, preferred_element_type=f32)
        return rearrange(dw, "i g o -> i (g o)")

    dw_KID = jax.lax.map(tap, jnp.arange(taps))
    return *pull(dy_BTD), dw_KID.astype(w_KID.dtype)


grouped_conv.defvjp(_grouped_conv_fwd, _grouped_conv_bwd)


class ConvPosition(nn.Module):
    """gelu(grouped convolution over time), weights normalised per tap (arXiv 1602.07868)."""

    config: BeatsConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        taps, groups, width = self.config.conv_kernel, self.config.conv_groups, x_BTD.shape[-1]
        dtype = self.options.dtype
        shape = (taps, width // groups, width)
        std = math.sqrt(4 / (taps * width))
        v = declare(self, "weight_v", nn.initializers.normal(std), shape, (None, None, "embed"))
        # At first the length of a random weight_v, so that the weight itself is normal(std).
        size = nn.initializers.constant(std * math.sqrt(width * width / groups))
        g = declare(self, "weight_g", size, (taps,), (None,))
        bias = declare(self, "bias", nn.initializers.zeros, (width,), ("embed",))
        norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2), keepdims=True))
        w_KID = (g[:, None, None] * v / norm).astype(dtype)
        y_BTD = grouped_conv(x_BTD.astype(dtype), w_KID, groups)
        return gelu(y_BTD + bias.astype(dtype)[None, None])


class BeatsAttention(nn.Module):
    """Self-attention whose position bias is scaled per head and query (arXiv 2110.13900, 3.1).

    The released code divides the scores by 32, subtracts the row maximum and multiplies back
    before a half-precision softmax. Float32 scores need none of that, and it cancels.
    """

    config: BeatsConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, x_BTD: jax.Array, bias_NTS: jax.Array, visible_BT: jax.Array) -> jax.Array:
        width, heads, options = x_BTD.shape[-1], self.config.num_heads, self.options
        q_BTNH, k_BTNH, v_BTNH = (
            project_heads(x_BTD, width, heads, options, True, name)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        grep = Linear(
            GATES * GATE_TERMS, options, use_bias=True, axes=(None, None), name="grep_linear"
        )
        terms = rearrange(grep(q_BTNH).astype(jnp.float32), "b t n (g s) -> b n t g s", g=GATES)
        gates = jax.nn.sigmoid(jnp.sum(terms, axis=-1))
        grep_a = declare(self, "grep_a", nn.initializers.ones, (heads,), ("heads",))
        first, second = gates[..., 0], gates[..., 1]
        gate_BNT = first * (second * grep_a[None, :, None] - 1.0) + 2.0
        out_BTNH = attend_biased(q_BTNH, k_BTNH, v_BTNH, gate_BNT, bias_NTS, visible_BT)
        return merge_heads(out_BTNH, width, options, "o_proj")


class BeatsBlock(nn.Module):
    """Post-LayerNorm block with DeepNorm's residual scale α = (2L)^¼ (arXiv 2203.00555)."""

    config: BeatsConfig
    options: LayerOptions

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, layer_input: None, shared: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        config, options = self.config, self.options
        alpha = (2 * config.num_layers) ** 0.25
        h_BTD = BeatsAttention(config, options, name="attention")(x_BTD, *shared)
        x_BTD = LayerNorm(config.norm_eps, options, name="attention_norm")(alpha * x_BTD + h_BTD)
        h_BTD = Mlp(config.mlp_dim, gelu, options, name="mlp")(x_BTD)
        return LayerNorm(config.norm_eps, options, name="mlp_norm")(alpha * x_BTD + h_BTD), None


class BeatsEncoder(nn.Module):
    """Patches of a filter bank to states. Padded tokens are hidden from the others, yet kept."""

    config: BeatsConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, fbank_BFM: jax.Array, length_B: jax.Array, num_samples: int) -> jax.Array:
        """Encode chunks.

        Args:
            fbank_BFM: float [B, frames, mel_bins], normalised.
            length_B: int, valid samples of each chunk; the rest is padding at its end.
            num_samples: samples of a whole chunk, a Python number.

        Returns:
            [B, (frames // p)·(mel_bins // p), D] in the compute dtype, time-major.

        Raises:
            ValueError: other mel bins than configured, or fewer frames than one patch.
        """
        config, options = self.config, self.options
        patch, (_, frames, bins) = config.patch_size, fbank_BFM.shape
        if bins != config.mel_bins or frames < patch:
            raise ValueError(
                f"fbank of {frames} frames x {bins} bins; the encoder takes at least {patch} "
                f"frames x {config.mel_bins} bins"
            )
        patches_BTC = rearrange(
            fbank_BFM[:, : frames // patch * patch, : bins // patch * patch],
            "b (t p) (m q) -> b (t m) (p q)",
            p=patch,
            q=patch,
        )
        embed = Linear(config.embed_size, options, axes=(None, "embed"), name="patch_embedding")
        x_BTD = LayerNorm(config.norm_eps, options, name="patch_norm")(embed(patches_BTC))
        if config.projects:
            project = Linear(
                config.hidden_size, options, use_bias=True, axes=(None, "embed"), name="embed_proj"
            )
            x_BTD = project(x_BTD)

        tokens = x_BTD.shape[1]
        visible_BT = visible_tokens(length_B, num_samples, frames, tokens)
        x_BTD = jnp.where(visible_BT[..., None], x_BTD, 0)
        x_BTD = x_BTD + ConvPosition(config, options, name="conv_position")(x_BTD)
        x_BTD = LayerNorm(config.norm_eps, options, name="embed_norm")(x_BTD)
        x_BTD = shard(x_BTD, "batch", None, None)

        table_RN = declare(
            self,
            "relative_attention_bias",
            nn.initializers.normal(0.02),
            (config.num_buckets, config.num_heads),
            (None, "heads"),
        )
        bias_NTS = relative_bias(table_RN, tokens, config.max_distance)
        layers = scan_layers(
            BeatsBlock, config.num_layers, config.remat, "layers", config=config, options=options
        )
        x_BTD, _ = layers(x_BTD, None, (bias_NTS, visible_BT))
        return x_BTD
