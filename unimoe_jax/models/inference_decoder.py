"""The decoder as generation holds it: one set of arrays per layer, kernels [out, in].

A pure function of weights that `serve` makes of the parameters of a trained `UniMoE`. Both phases
run it: prefill over whole prompts, and decoding with one token per sequence against a cache.
Activations are feature-major, x_DX with X = B·T tokens. Experts are separate arrays on one device
that wants them so (nn/moe/decode.py), else stacked and handed to `moe_ffn`, which knows meshes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from unimoe_jax.config import AttentionProgram, DecoderConfig, MoEConfig
from unimoe_jax.models.token_stream import token_stream
from unimoe_jax.nn.attention import decode as decode_attention
from unimoe_jax.nn.attention.attend import attend
from unimoe_jax.nn.attention.decode import KVCache
from unimoe_jax.nn.attention.rope import apply_rope, rope_tables
from unimoe_jax.nn.kernels.splash_attention import attend_segments, suits
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.nn.moe import decode as decode_experts
from unimoe_jax.nn.moe.decode import Expert, product, swiglu
from unimoe_jax.nn.moe.dispatch import moe_ffn
from unimoe_jax.nn.moe.experts import SwiGLUExpert
from unimoe_jax.nn.moe.layer import Router
from unimoe_jax.nn.moe.router import Routing
from unimoe_jax.nn.stack import where_is
from unimoe_jax.parallel.sharding import check_divides, shard, spec_for
from unimoe_jax.params.paths import nest

ExpertLayout = Literal["separate", "stacked"]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Placement = Callable[[str, Any, tuple[str | None, ...]], jax.Array]


class Layer(NamedTuple):
    """Weights of one layer. router: parameters of `Router`, None in a dense layer, whose
    feed-forward is then the only expert. experts: `Expert`s, or {projection: kernel [E,in,out]}."""

    attention_norm: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    o: jax.Array
    mlp_norm: jax.Array
    router: Any
    experts: Any


class Weights(NamedTuple):
    """embedding, head [V,D] (one array where they are tied); final_norm [D]."""

    embedding: jax.Array
    layers: tuple[Layer, ...]
    final_norm: jax.Array
    head: jax.Array


class Step(NamedTuple):
    """logits_BV float32 of the last token of every sequence; one cache per layer; expert_LBTK int32
    choices of the MoE layers in layer order, E = none."""

    logits_BV: jax.Array
    caches: tuple[KVCache, ...]
    expert_LBTK: jax.Array


# ------------------------------------------------------------------------------------ weights


def inference_weights(
    config: DecoderConfig,
    params: Mapping[str, Any],
    axes: Mapping[str, tuple[str | None, ...]],
    layout: ExpertLayout,
    place: Placement,
) -> Weights:
    """Parameters of a model without adapters, {path: host array}, as `Weights`.

    axes: logical axes of every parameter. place: (path, array, logical axes) -> array on the
    devices in the dtype it is to have; called once per array, so that a large model never lies on
    the host twice.

    Raises:
        ShardingError: the mesh in force cuts heads that it does not divide, or rows and heads of
            the cache over the same axis.
    """
    # A kernel may be cut within a head, the cache is cut between them.
    check_divides("model.decoder.num_kv_heads", config.num_kv_heads, "kv_heads")
    spec_for(("batch", "kv_heads", None, None), "the cache of keys and values")

    def whole(path: str, transposed: bool = False) -> jax.Array:
        value, names = params[path], axes[path]
        return place(path, value.T, names[::-1]) if transposed else place(path, value, names)

    def layer(where: Any, is_moe: bool) -> Layer:
        def part(name: str, index: tuple[int, ...] = (), transposed: bool = False) -> jax.Array:
            path = f"decoder/{where.prefix}/{name}"
            value = params[path][(where.index, *index)]
            names = axes[path][1 + len(index) :]
            if transposed:
                value, names = value.T, names[::-1]
            return place(path, value, names)

        def expert(prefix: str, index: tuple[int, ...] = ()) -> Expert:
            return Expert(*(part(f"{prefix}/{name}/kernel", index, True) for name in PROJECTIONS))

        router, experts = None, (expert("mlp"),) if not is_moe else None
        if is_moe:
            prefix = f"decoder/{where.prefix}/moe/"
            inside = [p.removeprefix(prefix) for p in params if p.startswith(prefix + "router/")]
            router = nest({p.removeprefix("router/"): part(f"moe/{p}") for p in inside})
            if layout == "separate":
                numbers = range(config.moe.num_experts)
                experts = tuple(expert("moe/experts", (number,)) for number in numbers)
            else:
                kernels = {name: part(f"moe/experts/{name}/kernel") for name in PROJECTIONS}
                experts = {name: {"kernel": kernel} for name, kernel in kernels.items()}
        projections = [part(f"attention/{n}_proj/kernel", transposed=True) for n in "qkvo"]
        norms = [part(f"{name}/scale") for name in ("attention_norm", "mlp_norm")]
        return Layer(norms[0], *projections, norms[1], router, experts)

    kinds = config.moe_layers()
    layers = tuple(layer(where, kind) for where, kind in zip(where_is(kinds), kinds, strict=True))
    embedding = whole("embed/embedding")
    head = embedding if config.tie_embeddings else whole("lm_head/kernel", transposed=True)
    return Weights(embedding, layers, whole("decoder/final_norm/scale"), head)


# ------------------------------------------------------------------------------------ forward


def rms_norm(x_DX: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """`RMSNorm` along the first axis, in the dtype of x."""
    x = x_DX.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=0, keepdims=True) + eps)
    return x.astype(x_DX.dtype) * scale_D[:, None].astype(x_DX.dtype)


@dataclass(frozen=True)
class InferenceDecoder:
    """Prefill and one step of decoding; `dtype`: computations and cache; `attention`: of the
    model's configuration."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    attention: AttentionProgram = "auto"

    def prefill(
        self,
        weights: Weights,
        token_id_BT: jax.Array,
        modality_BT: jax.Array,
        slot_BT: jax.Array,
        soft_GSD: jax.Array,
        length_B: jax.Array,
    ) -> Step:
        """Prompts, padded on the right; arguments as in `Batch`, soft_GSD as in `token_stream`.

        length_B: int32 positions in use. Each of the caches has T slots, in order.
        """
        batch, length = token_id_BT.shape
        text_BTD = weights.embedding[token_id_BT].astype(self.dtype)
        x_DX = rearrange(token_stream(text_BTD, soft_GSD, slot_BT), "b t d -> d (b t)")
        at_BT = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
        valid_BT = at_BT < length_B[:, None]

        def attention(q_BTNH, k_BTKH, v_BTKH, layer):
            del layer
            # Padding comes after every token: what is causal does not see it.
            if suits(self.attention, "causal", length):
                whole_BT = jnp.zeros((batch, length), jnp.int32)
                y = attend_segments(q_BTNH, k_BTKH, v_BTKH, whole_BT, scale=self.scale)
            else:
                mask_BTS = at_BT[:1, :, None] >= at_BT[:1, None, :]
                y = attend(q_BTNH, k_BTKH, v_BTKH, scale=self.scale, mask_BTS=mask_BTS)
            k, v = rearrange(k_BTKH, "b t k h -> b k h t"), rearrange(v_BTKH, "b t k h -> b k t h")
            return y, KVCache(k, v)

        x_DX, caches, experts = self._layers(weights, x_DX, at_BT, modality_BT, valid_BT, attention)
        last_X = jnp.arange(batch) * length + length_B - 1
        return Step(self._logits(weights, x_DX[:, last_X]), caches, experts)

    def step(
        self,
        weights: Weights,
        caches: tuple[KVCache, ...],
        token_B: jax.Array,
        cursor: jax.Array,
        length_B: jax.Array,
    ) -> Step:
        """Feed one text token per sequence.

        cursor: int32, where the ring is written. length_B: int32 tokens cached before this one.
        """
        x_DX = weights.embedding[token_B].astype(self.dtype).T
        seen_BS = decode_attention.visible(cursor, length_B + 1, caches[0].slots)

        def attention(q_BTNH, k_BTKH, v_BTKH, layer):
            # Written first and read afterwards, so that the cache is changed in place.
            cache = decode_attention.write(caches[layer], k_BTKH[:, 0], v_BTKH[:, 0], cursor)
            y = decode_attention.attend_one(q_BTNH[:, 0], cache, seen_BS, scale=self.scale)
            return y[:, None], cache

        text_BT = jnp.zeros((len(token_B), 1), jnp.int32)
        x_DX, new, experts = self._layers(
            weights, x_DX, length_B[:, None], text_BT, text_BT == 0, attention
        )
        return Step(self._logits(weights, x_DX), new, experts)

    @property
    def scale(self) -> float:
        return self.config.head_size**-0.5

    @property
    def moe(self) -> MoEConfig:
        """Routing without chance: the best experts, none drawn (8e's sample_second)."""
        return self.config.moe.answering

    def _layers(self, weights, x_DX, position_BT, modality_BT, valid_BT, attention):
        config, caches, chosen = self.config, [], []
        rope = rope_tables(
            position_BT, config.head_size, config.rope_theta, config.rope_table_dtype
        )
        for number, layer in enumerate(weights.layers):
            x_DX = shard(x_DX, None, "batch")
            h = rms_norm(x_DX, layer.attention_norm, config.norm_eps)
            q, k, v = self._projected(layer, h, rope, position_BT.shape)
            y, cache = attention(q, k, v, number)
            y = rearrange(y, "b t n h -> (n h) (b t)")
            x_DX = x_DX + product(layer.o, y).astype(self.dtype)
            h = rms_norm(x_DX, layer.mlp_norm, config.norm_eps)
            y, routing = self._feed_forward(layer, h, modality_BT, valid_BT)
            x_DX = x_DX + y
            caches.append(cache)
            if routing is not None:
                chosen.append(routing.expert_XK.reshape(*valid_BT.shape, -1))
        empty = jnp.zeros((0, *valid_BT.shape, 1), jnp.int32)
        return x_DX, tuple(caches), jnp.stack(chosen) if chosen else empty

    def _projected(self, layer: Layer, h_DX, rope, shape):
        batch, length = shape

        def heads(w, number: int) -> jax.Array:
            y = product(w, h_DX).astype(self.dtype)
            return rearrange(y, "(n h) (b t) -> b t n h", n=number, b=batch, t=length)

        config = self.config
        q = apply_rope(heads(layer.q, config.num_heads), *rope)
        k = apply_rope(heads(layer.k, config.num_kv_heads), *rope)
        return q, k, heads(layer.v, config.num_kv_heads)

    def _feed_forward(self, layer: Layer, h_DX, modality_BT, valid_BT):
        if layer.router is None:
            return swiglu(layer.experts[0], h_DX), None
        batch, length = valid_BT.shape
        h_BTD = rearrange(h_DX, "d (b t) -> b t d", b=batch)
        routing: Routing = Router(self.moe, LayerOptions(self.dtype)).apply(
            {"params": layer.router}, h_BTD, modality_BT, valid_BT
        )
        if isinstance(layer.experts, tuple):
            return (
                decode_experts.apply(layer.experts, h_DX, routing.expert_XK, routing.weight_XK),
                routing,
            )
        lead = (batch, length, -1)
        y_BTD = moe_ffn(
            SwiGLUExpert(self.dtype),
            layer.experts,
            h_BTD,
            routing.expert_XK.reshape(lead),
            routing.weight_XK.reshape(lead),
            jnp.uint32(0),
            self.config.moe.dispatch,
            self.config.moe.exchange,
        )
        return rearrange(y_BTD, "b t d -> d (b t)"), routing

    def _logits(self, weights: Weights, x_DB: jax.Array) -> jax.Array:
        hidden = rms_norm(x_DB, weights.final_norm, self.config.norm_eps)
        # Rounded to the compute dtype, as the head of the whole model is.
        return product(weights.head, hidden).astype(self.dtype).astype(jnp.float32).T
