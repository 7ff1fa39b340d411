"""Learned queries read the states of an encoder and become soft tokens of the decoder.

There are two kinds of reader. `whisper_decoder` is Whisper's text decoder (arXiv 2212.04356) with
queries in place of word embeddings; a query sees itself and the queries before it. `qformer` is
BLIP-2's Q-Former (arXiv 2301.12597, section 3.1) without text; all queries see each other. Both
read all encoder states, including those of padding, as in the released models.

Parameters, with Q queries, D = `hidden_size`, De the encoder's width, L layers:

    queries                              [Q, D]
    projector/fc1/{kernel [D,features], bias}    … fc{projector_depth}

    whisper_decoder
    position_embedding                   [max_positions, D]    rows 0..Q-1 are used
    layers/attention_norm, layers/cross_attention_norm, layers/mlp_norm: {scale,bias}   [L, D]
    layers/attention/{q,v,o}_proj/{kernel [L,D,D], bias [L,D]}
    layers/attention/k_proj/kernel       [L,D,D]               no bias
    layers/cross_attention/…             the same; k_proj and v_proj kernels [L,De,D]
    layers/mlp/{fc1,fc2}/{kernel,bias}   [L,D,F] [L,F], [L,F,D] [L,D]
    final_norm/{scale,bias}              [D]

    qformer: layers are stacked in periods; `qformer_places` gives the path and index of layer l
    query_norm/{scale,bias}              [D]
    run_{r}/block_{b}/attention/{q,k,v,o}_proj/{kernel,bias}   [repeats, D, D], [repeats, D]
    run_{r}/block_{b}/cross_attention/…  in layers 0, n, 2n …; k_proj and v_proj have De inputs
    run_{r}/block_{b}/{attention_norm,cross_attention_norm,mlp_norm}/{scale,bias}
    run_{r}/block_{b}/mlp/{fc1,fc2}/{kernel,bias}

The originals start the queries at zero on top of a trained reader. Here the queries start at
normal(0.02), because identical queries of an untrained, bidirectional reader would always get the
same gradients and never become different.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimoe_jax.config import QueryConnectorConfig
from unimoe_jax.connectors.mlp import MlpConnector
from unimoe_jax.nn.attention.multihead import MultiHeadAttention
from unimoe_jax.nn.linear import LayerOptions, declare
from unimoe_jax.nn.mlp import Mlp, gelu
from unimoe_jax.nn.norm import LayerNorm
from unimoe_jax.nn.stack import Place, layer_runs, scan_layers, where_is
from unimoe_jax.parallel.sharding import shard

query_init = nn.initializers.normal(0.02)


def cross_layers(config: QueryConnectorConfig) -> tuple[bool, ...]:
    """One flag per Q-Former layer: True if the layer reads the encoder."""
    interval = config.cross_attention_every
    return tuple(layer % interval == 0 for layer in range(config.num_layers))


def qformer_places(config: QueryConnectorConfig) -> tuple[Place, ...]:
    """The path prefix and the index in the stack of each Q-Former layer's parameters."""
    return where_is(cross_layers(config))


class ReaderBlock(nn.Module):
    """Whisper's decoder block: norms before causal self-attention, cross-attention and MLP."""

    config: QueryConnectorConfig
    options: LayerOptions

    @nn.compact
    def __call__(
        self, x_BQD: jax.Array, layer_input: None, states_BSD: jax.Array
    ) -> tuple[jax.Array, None]:
        config, options, eps = self.config, self.options, self.config.norm_eps
        heads, queries = config.num_heads, x_BQD.shape[1]
        # A query sees itself and the queries before it.
        causal_1QQ = jnp.tril(jnp.ones((1, queries, queries), bool))
        h_BQD = LayerNorm(eps, options, name="attention_norm")(x_BQD)
        attention = MultiHeadAttention(heads, options, key_bias=False, name="attention")
        x_BQD = x_BQD + attention(h_BQD, mask_BTS=causal_1QQ)
        # All queries read all states of the encoder.
        h_BQD = LayerNorm(eps, options, name="cross_attention_norm")(x_BQD)
        cross = MultiHeadAttention(heads, options, key_bias=False, name="cross_attention")
        x_BQD = x_BQD + cross(h_BQD, states_BSD)
        h_BQD = LayerNorm(eps, options, name="mlp_norm")(x_BQD)
        return x_BQD + Mlp(config.mlp_dim, gelu, options, name="mlp")(h_BQD), None


class QFormerBlock(nn.Module):
    """BERT's post-LayerNorm block without dropout.

    Attributes:
        cross: whether cross-attention to the encoder stands between self-attention and MLP.
    """

    config: QueryConnectorConfig
    options: LayerOptions
    cross: bool

    @nn.compact
    def __call__(self, x_BQD: jax.Array, states_BSD: jax.Array) -> jax.Array:
        config, options, eps = self.config, self.options, self.config.norm_eps
        h_BQD = MultiHeadAttention(config.num_heads, options, name="attention")(x_BQD)
        x_BQD = LayerNorm(eps, options, name="attention_norm")(x_BQD + h_BQD)
        if self.cross:
            attention = MultiHeadAttention(config.num_heads, options, name="cross_attention")
            h_BQD = attention(x_BQD, states_BSD)
            x_BQD = LayerNorm(eps, options, name="cross_attention_norm")(x_BQD + h_BQD)
        h_BQD = Mlp(config.mlp_dim, gelu, options, name="mlp")(x_BQD)
        return LayerNorm(eps, options, name="mlp_norm")(x_BQD + h_BQD)


class QFormerPeriod(nn.Module):
    """The layers of one period of the layer pattern.

    Attributes:
        cross: one flag per layer of the period: True if the layer reads the encoder.
    """

    config: QueryConnectorConfig
    options: LayerOptions
    cross: tuple[bool, ...]

    @nn.compact
    def __call__(
        self, x_BQD: jax.Array, layer_input: None, states_BSD: jax.Array
    ) -> tuple[jax.Array, None]:
        for number, cross in enumerate(self.cross):
            block = QFormerBlock(self.config, self.options, cross, name=f"block_{number}")
            x_BQD = block(x_BQD, states_BSD)
        return x_BQD, None


class QueryConnector(nn.Module):
    """Map encoder states [B,S,De] to soft tokens [B,Q,features] in the compute dtype."""

    config: QueryConnectorConfig
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, states_BSD: jax.Array) -> jax.Array:
        config, options = self.config, self.options
        shape = (config.num_queries, config.hidden_size)
        queries_QD = declare(self, "queries", query_init, shape, (None, "embed"))
        # Every entry of the batch starts from the same queries.
        x_BQD = jnp.broadcast_to(
            queries_QD.astype(options.dtype)[None], (states_BSD.shape[0], *shape)
        )
        x_BQD = shard(x_BQD, "batch", None, None)
        # Let them read the encoder, then map the result to the decoder's width.
        if config.kind == "whisper_decoder":
            x_BQD = self.whisper_decoder(x_BQD, states_BSD)
        else:
            x_BQD = self.qformer(x_BQD, states_BSD)
        project = MlpConnector(config.projector_depth, self.features, options, name="projector")
        return project(x_BQD)

    def whisper_decoder(self, x_BQD: jax.Array, states_BSD: jax.Array) -> jax.Array:
        """Run Whisper's decoder over the queries, including its final LayerNorm: [B,Q,D]."""
        config, options = self.config, self.options
        shape = (config.max_positions, config.hidden_size)
        position_TD = declare(self, "position_embedding", query_init, shape, (None, "embed"))
        x_BQD = x_BQD + position_TD[: config.num_queries].astype(options.dtype)[None]
        layers = scan_layers(
            ReaderBlock, config.num_layers, False, "layers", config=config, options=options
        )
        x_BQD, _ = layers(x_BQD, None, states_BSD)
        return LayerNorm(config.norm_eps, options, name="final_norm")(x_BQD)

    def qformer(self, x_BQD: jax.Array, states_BSD: jax.Array) -> jax.Array:
        """Normalise the queries and run the Q-Former over them: [B,Q,D]."""
        config, options = self.config, self.options
        x_BQD = LayerNorm(config.norm_eps, options, name="query_norm")(x_BQD)
        for number, run in enumerate(layer_runs(cross_layers(config))):
            layers = scan_layers(
                QFormerPeriod,
                run.repeats,
                False,
                f"run_{number}",
                config=config,
                options=options,
                cross=run.period,
            )
            x_BQD, _ = layers(x_BQD, None, states_BSD)
        return x_BQD
