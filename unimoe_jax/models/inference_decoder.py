"""The decoder as generation holds it: one set of arrays per layer, kernels [out, in].

`inference_weights` makes the weights from the parameters of a trained `UniMoE`, and
`InferenceDecoder` is a pure function of them. It has two phases: prefill runs over whole prompts,
and decoding feeds one token per sequence and reads the rest from a cache. Activations are
feature-major, x_DX with X = B·T tokens. With the layout "separate", which needs a single device,
every expert is a separate array (nn/moe/decode.py). With the layout "stacked", experts are run by
`moe_ffn`, which can shard them over a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
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
from unimoe_jax.nn.stack import Place, where_is
from unimoe_jax.parallel.sharding import check_divides, shard, spec_for
from unimoe_jax.params.paths import nest

ExpertLayout = Literal["separate", "stacked"]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Placement = Callable[[str, Any, tuple[str | None, ...]], jax.Array]
"""(path, host array, logical axes) -> the array on the devices."""
Attend = Callable[[jax.Array, jax.Array, jax.Array, int], tuple[jax.Array, KVCache]]
"""(q, k, v, layer number) -> (attention output [B,T,N,H], the layer's cache)."""


class Layer(NamedTuple):
    """Weights of one layer; kernels are [out, in].

    router: parameters of `Router`; None in a dense layer, whose feed-forward is the only expert.
    experts: a tuple of `Expert`s, or stacked {projection: {"kernel": [E,in,out]}}.
    """

    attention_norm: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    o: jax.Array
    mlp_norm: jax.Array
    router: Any
    experts: Any


class Weights(NamedTuple):
    """Weights of the decoder: embedding and head [V,D], the same array if tied; final_norm [D]."""

    embedding: jax.Array
    layers: tuple[Layer, ...]
    final_norm: jax.Array
    head: jax.Array


class Step(NamedTuple):
    """The result of prefill or of one step of decoding.

    logits_BV: float32 logits after the last token of every sequence.
    caches: keys and values, one cache per layer.
    expert_LBTK: int32 choices of the layers with experts, in layer order; E means no expert.
    """

    logits_BV: jax.Array
    caches: tuple[KVCache, ...]
    expert_LBTK: jax.Array


# ------------------------------------------------------------------------------------ weights


def held_dtype(path: str, dtype: Any) -> np.dtype:
    """The dtype in which the parameter at `path` is held if kernels are held in `dtype`.

    Routers keep float32, in which they compute by default, and so do the scales of norms, which are
    small. All other parameters are held in `dtype`.
    """
    keeps_float32 = "/router/" in path or path.endswith("/scale")
    return jnp.dtype(jnp.float32 if keeps_float32 else dtype)


def inference_weights(
    config: DecoderConfig,
    params: Mapping[str, Any],
    axes: Mapping[str, tuple[str | None, ...]],
    layout: ExpertLayout,
    place: Placement,
) -> Weights:
    """Make `Weights` from the parameters of a model without adapters.

    Args:
        params: {path: host array}, layers and experts stacked.
        axes: {path: logical axes of the parameter}.
        layout: whether every expert is a separate array or all experts of a layer are stacked.
        place: puts an array on the devices in the dtype it is held in. It is called once per array
            of the result, so that the host never holds a second copy of a large model.

    Raises:
        ShardingError: the number of key heads is not divisible by the devices over which the mesh
            in force shards them, or the cache's rows and heads are sharded over the same axis.
    """
    # The KV cache is sharded by whole heads, so num_kv_heads must be divisible. A kernel could also
    # be split inside a head.
    check_divides("model.decoder.num_kv_heads", config.num_kv_heads, "kv_heads")
    spec_for(("batch", "kv_heads", None, None), "the cache of keys and values")

    reader = _Reader(params, axes, place)
    layers = tuple(
        _layer(reader, where, config.moe if is_moe else None, layout)
        for where, is_moe in zip(where_is(config.moe_layers()), config.moe_layers(), strict=True)
    )
    embedding = reader.read("embed/embedding")
    head = embedding if config.tie_embeddings else reader.read("lm_head/kernel", transposed=True)
    return Weights(embedding, layers, reader.read("decoder/final_norm/scale"), head)


@dataclass(frozen=True)
class _Reader:
    """Reads parameters, or parts of them, and places them on the devices."""

    params: Mapping[str, Any]
    axes: Mapping[str, tuple[str | None, ...]]
    place: Placement

    def read(
        self, path: str, index: tuple[int, ...] = (), *, transposed: bool = False
    ) -> jax.Array:
        """The parameter at `path`, or its part at the leading `index`."""
        value, names = self.params[path], self.axes[path]
        if index:
            value, names = value[index], names[len(index) :]
        if transposed:
            value, names = value.T, names[::-1]
        return self.place(path, value, names)


def _layer(reader: _Reader, where: Place, moe: MoEConfig | None, layout: ExpertLayout) -> Layer:
    """Weights of the layer whose parameters are at `where`; moe: None for a dense layer."""
    prefix = f"decoder/{where.prefix}"

    def part(name: str, index: tuple[int, ...] = (), *, transposed: bool = False) -> jax.Array:
        return reader.read(f"{prefix}/{name}", (where.index, *index), transposed=transposed)

    def expert(name: str, index: tuple[int, ...] = ()) -> Expert:
        gate, up, down = (
            part(f"{name}/{projection}/kernel", index, transposed=True)
            for projection in PROJECTIONS
        )
        return Expert(gate, up, down)

    # The feed-forward layer: one expert, or a router and experts in the wanted layout.
    router = None
    if moe is None:
        experts = (expert("mlp"),)
    else:
        start = f"{prefix}/moe/router/"
        names = [path.removeprefix(start) for path in reader.params if path.startswith(start)]
        router = nest({name: part(f"moe/router/{name}") for name in names})
        if layout == "separate":
            experts = tuple(expert("moe/experts", (n,)) for n in range(moe.num_experts))
        else:
            kernels = {name: part(f"moe/experts/{name}/kernel") for name in PROJECTIONS}
            experts = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    # Attention and norms; `part` turns the kernels from [in, out] to [out, in].
    return Layer(
        attention_norm=part("attention_norm/scale"),
        q=part("attention/q_proj/kernel", transposed=True),
        k=part("attention/k_proj/kernel", transposed=True),
        v=part("attention/v_proj/kernel", transposed=True),
        o=part("attention/o_proj/kernel", transposed=True),
        mlp_norm=part("mlp_norm/scale"),
        router=router,
        experts=experts,
    )


# ------------------------------------------------------------------------------------ forward


def rms_norm(x_DX: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """`nn.norm.RMSNorm` along the first axis: the mean in float32, the result in the dtype of x."""
    x = x_DX.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=0, keepdims=True) + eps)
    return x.astype(x_DX.dtype) * scale_D[:, None].astype(x_DX.dtype)


@dataclass(frozen=True)
class InferenceDecoder:
    """Prefill and one step of decoding.

    dtype: the dtype of computations and of the cache.
    attention: the attention program of the model's settings.
    """

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
        """Run over whole prompts, which are padded on the right.

        Args:
            token_id_BT, modality_BT, slot_BT: int32, as in `Batch`.
            soft_GSD: the soft-token table, as in `token_stream`.
            length_B: int32, the number of positions of each prompt without padding.

        Returns:
            Logits after the last position of each prompt, and caches with T slots in order.
        """
        # Embed the prompts and put the soft tokens in.
        batch, length = token_id_BT.shape
        text_BTD = weights.embedding[token_id_BT].astype(self.dtype)
        x_DX = rearrange(token_stream(text_BTD, soft_GSD, slot_BT), "b t d -> d (b t)")
        position_BT = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
        valid_BT = position_BT < length_B[:, None]

        def attention(q_BTNH, k_BTKH, v_BTKH, layer):
            del layer
            # Padding comes after all tokens of the prompt, so the causal mask hides it from them.
            if suits(self.attention, "causal", length):
                whole_BT = jnp.zeros((batch, length), jnp.int32)
                y = attend_segments(q_BTNH, k_BTKH, v_BTKH, whole_BT, scale=self.scale)
            else:
                mask_BTS = position_BT[:1, :, None] >= position_BT[:1, None, :]
                y = attend(q_BTNH, k_BTKH, v_BTKH, scale=self.scale, mask_BTS=mask_BTS)
            k, v = rearrange(k_BTKH, "b t k h -> b k h t"), rearrange(v_BTKH, "b t k h -> b k t h")
            return y, KVCache(k, v)

        # Run the layers, then compute the logits of each prompt's last position only.
        x_DX, caches, experts = self._layers(
            weights, x_DX, position_BT, modality_BT, valid_BT, attention
        )
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

        Args:
            token_B: int32 token ids.
            cursor: int32 scalar, the slot of the ring to which keys and values are written.
            length_B: int32, the number of tokens in the cache before this one.
        """
        x_DX = weights.embedding[token_B].astype(self.dtype).T
        visible_BS = decode_attention.visible(cursor, length_B + 1, caches[0].slots)

        def attention(q_BTNH, k_BTKH, v_BTKH, layer):
            # Write before reading, so that XLA can update the cache in place.
            cache = decode_attention.write(caches[layer], k_BTKH[:, 0], v_BTKH[:, 0], cursor)
            y = decode_attention.attend_one(q_BTNH[:, 0], cache, visible_BS, scale=self.scale)
            return y[:, None], cache

        # A decoded token is text (modality 0), and none is padding.
        text_BT = jnp.zeros((len(token_B), 1), jnp.int32)
        x_DX, new_caches, experts = self._layers(
            weights, x_DX, length_B[:, None], text_BT, text_BT == 0, attention
        )
        return Step(self._logits(weights, x_DX), new_caches, experts)

    @property
    def scale(self) -> float:
        """The factor of attention scores, 1/√H."""
        return self.config.head_size**-0.5

    @property
    def moe(self) -> MoEConfig:
        """Routing without chance: the best experts are used, and none is drawn (sample_second)."""
        assert self.config.moe is not None
        return self.config.moe.answering

    def _layers(
        self,
        weights: Weights,
        x_DX: jax.Array,
        position_BT: jax.Array,
        modality_BT: jax.Array,
        valid_BT: jax.Array,
        attention: Attend,
    ) -> tuple[jax.Array, tuple[KVCache, ...], jax.Array]:
        """Run all layers: (x_DX, one cache per layer, expert choices [L,B,T,K])."""
        config, caches, choices = self.config, [], []
        rope = rope_tables(
            position_BT, config.head_size, config.rope_theta, config.rope_table_dtype
        )
        for number, layer in enumerate(weights.layers):
            # x += attention(norm(x))
            x_DX = shard(x_DX, None, "batch")
            h = rms_norm(x_DX, layer.attention_norm, config.norm_eps)
            q, k, v = self._projected(layer, h, rope, position_BT.shape)
            y, cache = attention(q, k, v, number)
            y = rearrange(y, "b t n h -> (n h) (b t)")
            x_DX = x_DX + product(layer.o, y).astype(self.dtype)
            # x += feed-forward or experts(norm(x))
            h = rms_norm(x_DX, layer.mlp_norm, config.norm_eps)
            y, routing = self._feed_forward(layer, h, modality_BT, valid_BT)
            x_DX = x_DX + y
            caches.append(cache)
            if routing is not None:
                choices.append(routing.expert_XK.reshape(*valid_BT.shape, -1))
        empty = jnp.zeros((0, *valid_BT.shape, 1), jnp.int32)
        return x_DX, tuple(caches), jnp.stack(choices) if choices else empty

    def _projected(
        self,
        layer: Layer,
        h_DX: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        shape: tuple[int, ...],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B,T,N,H], k and v [B,T,K,H]; q and k are rotated. shape: (B, T)."""
        batch, length = shape

        def heads(w: jax.Array, number: int) -> jax.Array:
            y = product(w, h_DX).astype(self.dtype)
            return rearrange(y, "(n h) (b t) -> b t n h", n=number, b=batch, t=length)

        config = self.config
        q = apply_rope(heads(layer.q, config.num_heads), *rope)
        k = apply_rope(heads(layer.k, config.num_kv_heads), *rope)
        return q, k, heads(layer.v, config.num_kv_heads)

    def _feed_forward(
        self, layer: Layer, h_DX: jax.Array, modality_BT: jax.Array, valid_BT: jax.Array
    ) -> tuple[jax.Array, Routing | None]:
        """The feed-forward layer or the experts: (y_DX, routing or None for a dense layer)."""
        if layer.router is None:
            return swiglu(layer.experts[0], h_DX), None
        # Choose experts.
        batch, length = valid_BT.shape
        h_BTD = rearrange(h_DX, "d (b t) -> b t d", b=batch)
        router = Router(self.moe, LayerOptions(self.dtype))
        variables = {"params": layer.router}
        routing = cast(Routing, router.apply(variables, h_BTD, modality_BT, valid_BT))
        # Apply them, each as a separate array or all stacked.
        if isinstance(layer.experts, tuple):
            y_DX = decode_experts.apply(layer.experts, h_DX, routing.expert_XK, routing.weight_XK)
            return y_DX, routing
        y_BTD = moe_ffn(
            SwiGLUExpert(self.dtype),
            layer.experts,
            h_BTD,
            routing.expert_XK.reshape(batch, length, -1),
            routing.weight_XK.reshape(batch, length, -1),
            jnp.uint32(0),
            self.moe.dispatch,
            self.moe.exchange,
        )
        return rearrange(y_BTD, "b t d -> d (b t)"), routing

    def _logits(self, weights: Weights, x_DB: jax.Array) -> jax.Array:
        """Logits [B,V] in float32 of the hidden states x_DB before the final norm."""
        hidden = rms_norm(x_DB, weights.final_norm, self.config.norm_eps)
        # Round to the compute dtype first, because the head of the trained model does so.
        return product(weights.head, hidden).astype(self.dtype).astype(jnp.float32).T
