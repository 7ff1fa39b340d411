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
from typing import Any

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
"""Queries whose scores are in memory at the same time, see `attend_biased`."""
GATES, GATE_TERMS = 2, 4
"""`grep_linear` has 8 outputs: two gates, each the sigmoid of the sum of four terms."""


def visible_tokens(
    length_B: jax.Array, num_samples: int, num_frames: int, num_tokens: int
) -> jax.Array:
    """Mark the tokens that begin inside the valid samples of their chunk: bool [B,T].

    Every frame gets the same number of samples and every token the same number of frames; the
    remainders at the end are dropped. A token is masked if all of its samples are padding. Padding
    is a suffix, so it is enough to look at the token's first sample. This is coarser in time than
    the tokens are (a token spans p frames and p mel bins, and the tokens of one time step are
    consecutive), but the released encoder was trained with this mask.

    Example: 3300 samples, 18 frames and 8 tokens give 183 samples per frame, 2 frames per token and
    so 366 samples per token. With 1500 valid samples, the tokens that begin at samples 0, 366, 732,
    1098 and 1464 are visible, which are the first five.

    Args:
        length_B: int, the number of valid samples at the start of each chunk.
        num_samples: samples of a whole chunk.
        num_frames: frames of a whole chunk.
        num_tokens: T, tokens of a whole chunk.

    Raises:
        ValueError: there are more tokens than frames or more frames than samples.
    """
    if not num_tokens <= num_frames <= num_samples:
        raise ValueError(
            f"{num_tokens} tokens of {num_frames} frames of {num_samples} samples: every token "
            "needs at least one frame, and every frame at least one sample"
        )
    samples_per_token = (num_samples // num_frames) * (num_frames // num_tokens)
    start_T = jnp.arange(num_tokens) * samples_per_token
    return start_T[None] < length_B[:, None]


def relative_buckets(offset: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Map offsets (key position − query position) to buckets: int, in the shape of `offset`.

    Half of the buckets belong to keys after the query. Within a half, the first half of the buckets
    hold one distance each, and the others grow logarithmically up to `max_distance`; larger
    distances share the last bucket (arXiv 1910.10683, section 2.1, as in T5).

    Example with 320 buckets and a maximum of 800: the offsets −3, 3, −80, −800 and 2000 fall into
    the buckets 3, 163, 80, 159 and 319.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    far = exact + (ratio / math.log(max_distance / exact) * (half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return np.where(offset > 0, half, 0) + bucket


def relative_bias(table_RN: jax.Array, length: int, max_distance: int) -> jax.Array:
    """Bias of every pair of positions, [N,T,T] (head, query, key), from the table [buckets,N].

    The bias depends only on key − query. Gathering it for every pair would read T² elements, so
    the matrix is made by reshaping: the 2T possible values in cyclic order are repeated T times and
    read in rows of 2T − 1, which shifts every row by one place against the row above.

    Example with T = 2, where v(d) is the value for key − query = d: two copies of
    v(0) v(1) v(−2) v(−1), cut into rows of three, are

        v(0)  v(1)  v(−2)
        v(−1) v(0)  v(1)

    and the first two columns are the bias.
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
    """Self-attention whose scores get gate · bias added: [B,T,N,H] in the dtype of q.

    Queries are processed in chunks of `QUERY_CHUNK`, and the backward pass computes each chunk's
    scores again, so the scores [B,N,T,S] are never in memory as a whole.

    Args:
        gate_BNT: float32, the factor of the bias for each head and query.
        bias_NTS: float32, the position bias of each head, query and key.
        visible_BS: bool, False for keys that no query may see.
    """
    length, scale = q_BTNH.shape[1], q_BTNH.shape[-1] ** -0.5
    mask_BTS = visible_BS[:, None]

    # A chunk holds some of the queries and sees all keys.
    @jax.checkpoint
    def attend_chunk(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, gate, bias = chunk
        bias_BNTS = gate[..., None] * bias[None]
        return attend(q, k_BSNH, v_BSNH, scale=scale, mask_BTS=mask_BTS, bias_BNTS=bias_BNTS)

    if length <= QUERY_CHUNK:
        return attend_chunk((q_BTNH, gate_BNT, bias_NTS))

    def to_chunks(x: jax.Array, axis: int) -> jax.Array:
        """Cut the queries on `axis` into a leading axis of chunks; zeros fill the last chunk."""
        widths = [(0, -length % QUERY_CHUNK if dim == axis else 0) for dim in range(x.ndim)]
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], -1, QUERY_CHUNK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    chunks = (to_chunks(q_BTNH, 1), to_chunks(gate_BNT, 2), to_chunks(bias_NTS, 1))
    out = jax.lax.map(attend_chunk, chunks)
    # The queries that fill the last chunk are cut off again.
    return rearrange(out, "c b t n h -> b (c t) n h")[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def grouped_conv(x_BTD: jax.Array, w_KID: jax.Array, groups: int) -> jax.Array:
    """Convolve over time within each of `groups` groups of channels: [B,T,D], as long as x.

    The weights have K taps and I = D / groups input channels per output channel. The gradient of
    the weights is written by hand, as one matrix product per tap. XLA's version is a convolution,
    and its partitioner sums that over devices that hold the same rows, so the gradient would be
    twice too large on a mesh with `tensor` = 2. On a CPU, XLA's version also takes seventy times as
    long as the forward pass.

    Example with one channel, x = (1, 2, 3) and the taps w = (1, 10, 100), which belong to the time
    steps t − 1, t and t + 1: the result is (210, 321, 32). If the gradient of every output is 1,
    the gradient of w is (1 + 2, 1 + 2 + 3, 2 + 3) = (3, 6, 5).
    """
    return _convolve(x_BTD, w_KID, groups)


def _convolve(x_BTD: jax.Array, w_KID: jax.Array, groups: int) -> jax.Array:
    """The forward pass of `grouped_conv`, with XLA's gradients."""
    return jax.lax.conv_general_dilated(
        x_BTD,
        w_KID,
        window_strides=(1,),
        padding=[_margins(w_KID.shape[0])],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


def _margins(taps: int) -> tuple[int, int]:
    """Zeros before and after x that keep the length; an even number of taps looks back further."""
    return taps // 2, (taps - 1) // 2


def _grouped_conv_fwd(x_BTD: jax.Array, w_KID: jax.Array, groups: int):
    return grouped_conv(x_BTD, w_KID, groups), (x_BTD, w_KID)


def _grouped_conv_bwd(groups: int, residuals: tuple[jax.Array, jax.Array], dy_BTD: jax.Array):
    """(gradient of x, gradient of w): XLA's for x, one product per tap for w."""
    x_BTD, w_KID = residuals
    _, gradient_of_x = jax.vjp(lambda x: _convolve(x, w_KID, groups), x_BTD)
    taps, length = w_KID.shape[0], x_BTD.shape[1]
    padded = jnp.pad(x_BTD, ((0, 0), _margins(taps), (0, 0)))
    dy_BTGO = rearrange(dy_BTD, "b t (g o) -> b t g o", g=groups)

    def gradient_of_tap(tap: jax.Array) -> jax.Array:
        """[I,D]: the tap multiplied the input at t + tap into the output at t."""
        inputs = jax.lax.dynamic_slice_in_dim(padded, tap, length, axis=1)
        inputs_BTGI = rearrange(inputs, "b t (g i) -> b t g i", g=groups)
        f32 = jnp.float32
        dw = jnp.einsum("btgi,btgo->igo", inputs_BTGI, dy_BTGO, preferred_element_type=f32)
        return rearrange(dw, "i g o -> i (g o)")

    dw_KID = jax.lax.map(gradient_of_tap, jnp.arange(taps))
    return *gradient_of_x(dy_BTD), dw_KID.astype(w_KID.dtype)


grouped_conv.defvjp(_grouped_conv_fwd, _grouped_conv_bwd)


class ConvPosition(nn.Module):
    """gelu(grouped convolution over time) with weight normalisation per tap (arXiv 1602.07868).

    The weights of tap k are weight_g[k] · weight_v[k] / ‖weight_v[k]‖.
    """

    config: BeatsConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        taps, groups, width = self.config.conv_kernel, self.config.conv_groups, x_BTD.shape[-1]
        dtype = self.options.dtype
        shape = (taps, width // groups, width)
        std = math.sqrt(4 / (taps * width))
        v = declare(self, "weight_v", nn.initializers.normal(std), shape, (None, None, "embed"))
        # weight_g starts at the expected norm of weight_v[k], so the weights start at normal(std).
        expected_norm = nn.initializers.constant(std * math.sqrt(width * width / groups))
        g = declare(self, "weight_g", expected_norm, (taps,), (None,))
        bias = declare(self, "bias", nn.initializers.zeros, (width,), ("embed",))
        norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2), keepdims=True))
        w_KID = (g[:, None, None] * v / norm).astype(dtype)
        # jax gives the result of a custom_vjp no type.
        y_BTD: Any = grouped_conv(x_BTD.astype(dtype), w_KID, groups)
        return gelu(y_BTD + bias.astype(dtype)[None, None])


class BeatsAttention(nn.Module):
    """Self-attention whose position bias is scaled per head and query (arXiv 2110.13900, 3.1).

    The released code divides the scores by 32, subtracts the maximum of each row and multiplies by
    32 again, because its softmax runs in half precision. These steps cancel, and scores in float32
    do not need them.
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
        # Two gates per head and query, computed from q; both lie between 0 and 1.
        grep = Linear(
            GATES * GATE_TERMS, options, use_bias=True, axes=(None, None), name="grep_linear"
        )
        terms = rearrange(grep(q_BTNH).astype(jnp.float32), "b t n (g s) -> b n t g s", g=GATES)
        gates = jax.nn.sigmoid(jnp.sum(terms, axis=-1))
        # The bias of a query is multiplied by first · (second · grep_a − 1) + 2.
        grep_a = declare(self, "grep_a", nn.initializers.ones, (heads,), ("heads",))
        first, second = gates[..., 0], gates[..., 1]
        gate_BNT = first * (second * grep_a[None, :, None] - 1.0) + 2.0
        out_BTNH = attend_biased(q_BTNH, k_BTNH, v_BTNH, gate_BNT, bias_NTS, visible_BT)
        return merge_heads(out_BTNH, width, options, "o_proj")


class BeatsBlock(nn.Module):
    """Post-LayerNorm block with DeepNorm's residual scale α = (2L)^¼ (arXiv 2203.00555).

    `shared` holds the position bias [N,T,T] and the visible tokens [B,T], the same for all layers.
    """

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
    """Map the patches of a filter bank to states.

    Tokens of padding are masked, so no other token depends on them, but they stay in the output.
    """

    config: BeatsConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, fbank_BFM: jax.Array, length_B: jax.Array, num_samples: int) -> jax.Array:
        """Encode chunks.

        Args:
            fbank_BFM: float [B, frames, mel_bins], normalised.
            length_B: int, the number of valid samples of each chunk; padding follows them.
            num_samples: the number of samples of a whole chunk, a Python integer.

        Returns:
            [B, (frames // p)·(mel_bins // p), D] in the compute dtype: the patches of the first p
            frames come first, in order of their mel bins.

        Raises:
            ValueError: the number of mel bins is not the configured one, or there are fewer frames
                than one patch needs.
        """
        config, options = self.config, self.options
        patch, (_, frames, bins) = config.patch_size, fbank_BFM.shape
        if bins != config.mel_bins or frames < patch:
            raise ValueError(
                f"the filter bank has {frames} frames x {bins} bins, but the encoder takes at "
                f"least {patch} frames x {config.mel_bins} bins"
            )
        # Cut the filter bank into p x p patches; frames and bins beyond the last patch are dropped.
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

        # Padding is set to zero before the convolution, which would mix it into valid tokens.
        tokens = x_BTD.shape[1]
        visible_BT = visible_tokens(length_B, num_samples, frames, tokens)
        x_BTD = jnp.where(visible_BT[..., None], x_BTD, 0)
        x_BTD = x_BTD + ConvPosition(config, options, name="conv_position")(x_BTD)
        x_BTD = LayerNorm(config.norm_eps, options, name="embed_norm")(x_BTD)
        x_BTD = shard(x_BTD, "batch", None, None)

        # All layers use the same table of position biases.
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
