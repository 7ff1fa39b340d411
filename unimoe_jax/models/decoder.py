"""LLaMA-shaped decoder whose feed-forward layers may be mixtures of experts.

Parameters: `run_{r}/block_{b}/{attention_norm, attention/{q,k,v,o}_proj, mlp_norm, mlp | moe}` with
a leading layers axis (see nn/stack.py), and `final_norm`.
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
    """What every layer shares: rotary tables, who sees whom, modality, validity, and which
    positions are read after the last layer (None: all)."""

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
        if isinstance(context.seen, Segments):
            y = attend_segments(q, k, v, context.seen.segment_BT, scale=size**-0.5)
        else:
            y = attend_packed(q, k, v, context.seen, scale=size**-0.5)
        y = rearrange(y, "b t n h -> b t (n h)")
        return Linear(x_BTD.shape[-1], self.options, axes=("heads", "embed"), name="o_proj")(y)


class Block(nn.Module):
    """x += attention(norm(x)); x += feed-forward or experts(norm(x)).

    Experts leave out positions where `wanted_BT` is False.
    """

    config: DecoderConfig
    is_moe: bool
    options: LayerOptions

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, wanted_BT: jax.Array | None = None
    ) -> tuple[jax.Array, MoEAux | None]:
        config, options = self.config, self.options
        h = RMSNorm(config.norm_eps, options, name="attention_norm")(x_BTD)
        x_BTD = x_BTD + Attention(config, options, name="attention")(h, context)
        h = RMSNorm(config.norm_eps, options, name="mlp_norm")(x_BTD)
        aux = None
        if self.is_moe:
            moe = MoE(config.moe, SwiGLUForm(config.mlp_dim), options, name="moe")
            h, aux = moe(h, context.modality_BT, context.valid_BT, wanted_BT=wanted_BT)
        else:
            h = SwiGLU(config.mlp_dim, options, name="mlp")(h)
        return shard(x_BTD + h, "batch", "tokens", None), aux


class LayerOutput(NamedTuple):
    """Per layer: router statistics (MoE only), and when asked for, the residual stream after it."""

    aux: MoEAux | None
    hidden: jax.Array | None


class Period(nn.Module):
    """One period of the layer pattern: what a run scans over, with the word whether it is the last
    of the decoder. No position is read after that one's last block but those of the context."""

    config: DecoderConfig
    period: tuple[bool, ...]
    options: LayerOptions
    keep: frozenset[str]

    @nn.compact
    def __call__(self, x_BTD: jax.Array, last: jax.Array, context: Context):
        outputs, read_BT = [], context.read_BT
        for number, is_moe in enumerate(self.period):
            block = Block(self.config, is_moe, self.options, name=f"block_{number}")
            ends = read_BT is not None and number + 1 == len(self.period)
            x_BTD, aux = block(x_BTD, context, read_BT | ~last if ends else None)
            outputs.append(LayerOutput(aux, x_BTD if "hidden" in self.keep else None))
        return x_BTD, tuple(outputs)


class DecoderOutput(NamedTuple):
    """hidden_BTD after the final norm; aux stacked over MoE layers in layer order (or None);
    layers: hidden states stacked per run and block, for inspection."""

    hidden_BTD: jax.Array
    aux: MoEAux | None
    layers: Any


def causal_mask(segment_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
    """[B,T,T] True where a query sees a key: same segment, not later."""
    same = segment_BT[:, :, None] == segment_BT[:, None, :]
    return same & (position_BT[:, :, None] >= position_BT[:, None, :])


class Decoder(nn.Module):
    """Embedded token stream -> hidden states. Embedding and head belong to the model.

    `keep` may hold "hidden": what `DecoderOutput.layers` carries per layer.
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
        """read_BT: bool, positions whose hidden states will be read; the last layer's experts leave
        out the others. None: all. segment_BT: given if the mask is that of causal attention within
        segments and nothing else, for platforms that have a kernel for it."""
        config = self.config
        cos, sin = rope_tables(
            position_BT, config.head_size, config.rope_theta, config.rope_table_dtype
        )
        kernel = segment_BT is not None and suits(self.options.attention, "causal", x_BTD.shape[1])
        seen = Segments(segment_BT) if kernel else tiles_of(mask_BTS, valid_BT)
        context = Context(cos, sin, seen, modality_BT, valid_BT, read_BT)
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
            last = (jnp.arange(run.repeats) == run.repeats - 1) & (number + 1 == len(runs))
            x_BTD, outputs = stack(x_BTD, last, context)
            layers.append(outputs)
            moe = [output.aux for output in outputs if output.aux is not None]
            if moe:
                # [repeats, blocks, …] -> layer order
                stacked = jax.tree.map(lambda *a: jnp.stack(a, axis=1), *moe)
                aux.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked))
        joined = jax.tree.map(lambda *a: jnp.concatenate(a), *aux) if aux else None
        hidden = RMSNorm(config.norm_eps, self.options, name="final_norm")(x_BTD)
        return DecoderOutput(hidden, joined, tuple(layers))
