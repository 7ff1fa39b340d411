"""LLaMA-shaped decoder whose feed-forward layers may be mixtures of experts, as it is trained.

Parameters: `run_{r}/block_{b}/{attention_norm, attention/{q,k,v,o}_proj, mlp_norm, mlp | moe}` with
a leading layers axis (see nn/stack.py), and `final_norm`. Generation uses `inference_decoder` with
the same parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from unimoe_jax.config import DecoderConfig
from unimoe_jax.nn.attention.packed import Tiles, attend_packed, tiles_of
from unimoe_jax.nn.attention.rope import apply_rope, rope_tables
from unimoe_jax.nn.kernels.splash_attention import Segments, attend_segments, suits
from unimoe_jax.nn.linear import LayerOptions, Linear
from unimoe_jax.nn.mlp import SwiGLU
from unimoe_jax.nn.moe.experts import SwiGLUForm
from unimoe_jax.nn.moe.layer import MoE, MoEAux
from unimoe_jax.nn.norm import RMSNorm
from unimoe_jax.nn.stack import layer_runs, scan_layers
from unimoe_jax.parallel.sharding import shard


class Context(NamedTuple):
    """The inputs that all layers share.

    cos, sin: rotary tables.
    seen: which keys each query sees, in the form that the attention program of the platform takes.
    modality_BT: int32, see `config.media.MODALITY`. valid_BT: bool, False for padding.
    read_BT: bool, positions whose hidden states are read after the last layer; None: all.
    """

    cos: jax.Array
    sin: jax.Array
    seen: Tiles | Segments
    modality_BT: jax.Array
    valid_BT: jax.Array
    read_BT: jax.Array | None = None


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions, no biases."""

    config: DecoderConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        config, size = self.config, self.config.head_size

        def project(name: str, heads: int, axis: str) -> jax.Array:
            layer = Linear(heads * size, self.options, axes=("embed", axis), name=name)
            return rearrange(layer(x_BTD), "b t (n h) -> b t n h", n=heads)

        q = apply_rope(project("q_proj", config.num_heads, "heads"), context.cos, context.sin)
        k = apply_rope(project("k_proj", config.num_kv_heads, "kv_heads"), context.cos, context.sin)
        v = project("v_proj", config.num_kv_heads, "kv_heads")
        # The kernel takes segments; without a kernel, the mask comes in tiles.
        if isinstance(context.seen, Segments):
            y = attend_segments(q, k, v, context.seen.segment_BT, scale=size**-0.5)
        else:
            y = attend_packed(q, k, v, context.seen, scale=size**-0.5)
        y = rearrange(y, "b t n h -> b t (n h)")
        return Linear(x_BTD.shape[-1], self.options, axes=("heads", "embed"), name="o_proj")(y)


class Block(nn.Module):
    """Pre-norm block: x += attention(norm(x)); x += feed-forward or experts(norm(x)).

    wanted_BT: bool, False for positions whose result nobody reads: experts leave them out.
    """

    config: DecoderConfig
    is_moe: bool
    options: LayerOptions

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, wanted_BT: jax.Array | None = None
    ) -> tuple[jax.Array, MoEAux | None]:
        config, options = self.config, self.options
        # Attention, then a dense feed-forward layer or experts, each added to the stream.
        h = RMSNorm(config.norm_eps, options, name="attention_norm")(x_BTD)
        x_BTD = x_BTD + Attention(config, options, name="attention")(h, context)
        h = RMSNorm(config.norm_eps, options, name="mlp_norm")(x_BTD)
        aux = None
        if self.is_moe:
            assert config.moe is not None
            moe = MoE(config.moe, SwiGLUForm(config.mlp_dim), options, name="moe")
            h, aux = moe(h, context.modality_BT, context.valid_BT, wanted_BT=wanted_BT)
        else:
            h = SwiGLU(config.mlp_dim, options, name="mlp")(h)
        return shard(x_BTD + h, "batch", "tokens", None), aux


class LayerOutput(NamedTuple):
    """Router statistics of a layer with experts, and the stream after the layer if it is kept."""

    aux: MoEAux | None
    hidden: jax.Array | None


class Period(nn.Module):
    """The blocks of one period of the layer pattern; a run of layers is a scan over its periods.

    Attributes:
        period: one flag per block: True if the block has experts.
        keep: see `Decoder`.
    """

    config: DecoderConfig
    period: tuple[bool, ...]
    options: LayerOptions
    keep: frozenset[str]

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, last: jax.Array, context: Context
    ) -> tuple[jax.Array, tuple[LayerOutput, ...]]:
        """Run the blocks in order. last: bool scalar, True in the last period of the decoder."""
        outputs, read_BT = [], context.read_BT
        for number, is_moe in enumerate(self.period):
            block = Block(self.config, is_moe, self.options, name=f"block_{number}")
            # After the decoder's last block, only the positions in `read_BT` are used. The same
            # program runs in the earlier periods of the scan, where all positions are wanted.
            wanted_BT = None
            if read_BT is not None and number + 1 == len(self.period):
                wanted_BT = read_BT | ~last
            x_BTD, aux = block(x_BTD, context, wanted_BT)
            outputs.append(LayerOutput(aux, x_BTD if "hidden" in self.keep else None))
        return x_BTD, tuple(outputs)


class DecoderOutput(NamedTuple):
    """The result of the decoder.

    hidden_BTD: hidden states after the final norm, in the compute dtype.
    aux: router statistics, stacked over the layers with experts in layer order, or None.
    layers: for inspection, a `LayerOutput` per run and block, stacked over the repeats of the run.
    """

    hidden_BTD: jax.Array
    aux: MoEAux | None
    layers: Any


def causal_mask(segment_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
    """bool [B,T,T]: True where query t sees key s, which is in the same segment and not later."""
    same = segment_BT[:, :, None] == segment_BT[:, None, :]
    return same & (position_BT[:, :, None] >= position_BT[:, None, :])


class Decoder(nn.Module):
    """Map the embedded token stream to hidden states. Embedding and head belong to the model.

    Attributes:
        keep: with "hidden", `DecoderOutput.layers` holds the stream after every layer.
    """

    config: DecoderConfig
    options: LayerOptions
    keep: frozenset[str] = frozenset()

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        position_BT: jax.Array,
        mask_BTS: jax.Array,
        modality_BT: jax.Array,
        valid_BT: jax.Array,
        read_BT: jax.Array | None = None,
        segment_BT: jax.Array | None = None,
    ) -> DecoderOutput:
        """Run all layers and the final norm.

        Args:
            x_BTD: embedded stream in the compute dtype.
            position_BT: int32, positions for the rotary tables.
            mask_BTS: bool, True where query t sees key s.
            modality_BT: int32, see `config.media.MODALITY`.
            valid_BT: bool, False for padding, which goes to no expert and into no statistics.
            read_BT: bool, positions whose hidden states will be read. The experts of the last layer
                leave out the others. None: all positions.
            segment_BT: int32, to be passed only if `mask_BTS` is exactly causal attention within
                these segments; platforms with a kernel for it use the segments, not the mask.
        """
        # Prepare what all layers share.
        config = self.config
        cos, sin = rope_tables(
            position_BT, config.head_size, config.rope_theta, config.rope_table_dtype
        )
        if segment_BT is not None and suits(self.options.attention, "causal", x_BTD.shape[1]):
            seen = Segments(segment_BT)
        else:
            seen = tiles_of(mask_BTS, valid_BT)
        context = Context(cos, sin, seen, modality_BT, valid_BT, read_BT)

        # Scan over every run of layers.
        aux, layers, runs = [], [], layer_runs(config.moe_layers())
        for number, run in enumerate(runs):
            stack = scan_layers(
                Period,
                run.repeats,
                config.remat,
                f"run_{number}",
                config=config,
                period=run.period,
                options=self.options,
                keep=self.keep,
            )
            # One flag per repeat: True in the last repeat of the last run.
            last = (jnp.arange(run.repeats) == run.repeats - 1) & (number + 1 == len(runs))
            x_BTD, outputs = stack(x_BTD, last, context)
            layers.append(outputs)
            moe = [output.aux for output in outputs if output.aux is not None]
            if moe:
                # Stack the blocks of a period and flatten [repeats, blocks, …] to layer order.
                stacked = jax.tree.map(lambda *a: jnp.stack(a, axis=1), *moe)
                aux.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked))

        joined = jax.tree.map(lambda *a: jnp.concatenate(a), *aux) if aux else None
        hidden = RMSNorm(config.norm_eps, self.options, name="final_norm")(x_BTD)
        return DecoderOutput(hidden, joined, tuple(layers))
