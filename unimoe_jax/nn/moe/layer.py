"""The sparse mixture-of-experts layer: router, experts, dispatch and statistics together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimoe_jax.config import MoEConfig
from unimoe_jax.config.media import MODALITY_GROUPS
from unimoe_jax.nn.linear import ExpertLinear, LayerOptions, Linear, torch_uniform
from unimoe_jax.nn.moe.dispatch import limit_load, moe_ffn
from unimoe_jax.nn.moe.experts import AdapterRules, ExpertForm, Weights
from unimoe_jax.nn.moe.router import (
    Routing,
    balance_loss,
    expert_load,
    route,
    router_entropy,
    router_z_loss,
    row_mean,
)


class MoEAux(NamedTuple):
    """Statistics of one MoE layer; a stack of layers adds a leading layers axis.

    Fields that nobody reads cost nothing, because the compiler removes their computation.

    balance, router_z, entropy: float32 scalars over valid tokens, see `MoE`.
    load_ME: float32 [modalities, E], the number of token slots. It includes slots that are dropped.
    logits_BTE: float32 router logits.
    expert_BTK: int32, the router's choices, including slots that are dropped; E means no expert.
    weight_BTK: float32, the weights of the choices.
    dropped: float32 scalar, the number of slots above the capacity of the experts. None if there is
        no limit.
    """

    balance: jax.Array
    router_z: jax.Array
    entropy: jax.Array
    load_ME: jax.Array
    logits_BTE: jax.Array
    expert_BTK: jax.Array
    weight_BTK: jax.Array
    dropped: jax.Array | None


class ImageRows(NamedTuple):
    """Facts about the B images of a batch, for the MoE layers of encoders and connectors.

    modality_B: int32, the number of the image's modality, see `config.media`.
    weight_B: float32, the weight of the image in router statistics. 0 means an empty slot of the
        batch, which holds no image.
    """

    modality_B: jax.Array
    weight_B: jax.Array

    def tokens(self, length: int) -> tuple[jax.Array, jax.Array]:
        """Return (modality_BT int32, valid_BT bool), with `length` tokens per image."""
        shape = (*self.weight_B.shape, length)
        valid_B = self.weight_B > 0
        modality_B1, valid_B1 = self.modality_B[:, None], valid_B[:, None]
        return jnp.broadcast_to(modality_B1, shape), jnp.broadcast_to(valid_B1, shape)


class ModalityMap(nn.Module):
    """A linear map per modality in front of the router (the "FM block" of Uni-MoE 8e).

    As in the original, speech and audio share one map, and padding counts as text.
    """

    options: LayerOptions

    @nn.compact
    def __call__(self, x_BTD: jax.Array, modality_BT: jax.Array) -> jax.Array:
        def apply_map(name: str) -> jax.Array:
            axes = ("embed", None)
            layer = Linear(x_BTD.shape[-1], self.options, use_bias=True, axes=axes, name=name)
            return layer(x_BTD)

        # Compute all maps for all tokens, and choose per token.
        out = apply_map("text")
        for name in ("image", "video", "audio"):
            chosen = jnp.isin(modality_BT, jnp.asarray(MODALITY_GROUPS[name]))[..., None]
            out = jnp.where(chosen, apply_map(name), out)
        return out


class Router(nn.Module):
    """A linear router without bias; calling it returns the `Routing` of all B·T tokens."""

    config: MoEConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, x_BTD: jax.Array, modality_BT: jax.Array, valid_BT: jax.Array) -> Routing:
        config, options = self.config.router, self.options
        if config.modality_map:
            x_BTD = ModalityMap(options, name="modality_map")(x_BTD, modality_BT)
        if config.logits_dtype == "float32":
            options = replace(options, dtype=jnp.float32)
        normal = nn.initializers.normal(config.init_std)
        linear = Linear(
            self.config.num_experts,
            options,
            axes=("embed", None),
            kernel_init=torch_uniform if config.init == "fan_in" else normal,
            name="linear",
        )
        logits = linear(x_BTD)
        logits = logits.reshape(-1, self.config.num_experts)
        # With `sample_second` (Uni-MoE 8e) the experts after the first are drawn at random.
        noise = None
        if config.sample_second:
            noise = jax.random.gumbel(self.make_rng("router"), logits.shape)
        return route(
            logits, self.config.top_k, config, self.options.dtype, valid_BT.reshape(-1), noise
        )


class MoE(nn.Module):
    """Σ_k weight_k · expert_k(x), in place of a feed-forward layer.

    Attributes:
        config: the number of experts, the router, the capacity and the method of dispatch.
        form: the form of every expert, `SwiGLUForm` or `MlpForm`.
    """

    config: MoEConfig
    form: ExpertForm
    options: LayerOptions

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        modality_BT: jax.Array,
        valid_BT: jax.Array,
        row_weight_B: jax.Array | None = None,
        wanted_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, MoEAux]:
        """Route the tokens, apply their experts, and return (y, statistics); y is [B,T,features].

        Args:
            x_BTD: tokens.
            modality_BT: int32, the number of each token's modality, see `config.media`.
            valid_BT: bool. A token that is not valid goes to no expert and is in no statistic.
            row_weight_B: float32. If given, router statistics are computed for every row and
                averaged with these weights, which encoders use for their images. If None, they are
                computed over all tokens of the batch at once.
            wanted_BT: bool. False means that nobody reads the result, so no expert computes it and
                it is 0. The statistics include the token nevertheless. None means that all results
                are wanted.
        """
        config, options, width = self.config, self.options, x_BTD.shape[-1]
        routing = Router(config, options, name="router")(x_BTD, modality_BT, valid_BT)

        # Declare the experts, and draw the seed of their adapters' dropout if anything is dropped.
        experts = Experts(config.num_experts, width, self.form, options, name="experts")
        weights, adapters = experts()
        expert_fn = self.form.function(options, adapters)
        seed = jnp.uint32(0)
        if options.train and any(rule.dropout for _, rule in adapters):
            seed = jax.random.bits(self.make_rng("dropout"), dtype=jnp.uint32)

        # Remove the choices that exceed the capacity of an expert or whose result is not read.
        batch, length, _ = x_BTD.shape
        expert_BTK = routing.expert_XK.reshape(batch, length, -1)
        weight_BTK = routing.weight_XK.reshape(batch, length, -1)
        dropped = None
        if config.capacity_factor is not None:
            expert_BTK, weight_BTK, dropped = limit_load(
                expert_BTK, weight_BTK, config.num_experts, config.capacity_factor
            )
        if wanted_BT is not None:
            expert_BTK = jnp.where(wanted_BT[..., None], expert_BTK, config.num_experts)

        y = moe_ffn(
            expert_fn,
            weights,
            x_BTD,
            expert_BTK,
            weight_BTK,
            seed,
            method=config.dispatch,
            form=config.exchange,
            keep_hidden=options.keep_hidden,
        )
        aux = _statistics(routing, modality_BT, valid_BT, row_weight_B)
        return y, aux._replace(dropped=dropped)


class Experts(nn.Module):
    """Declares the weights of all experts, stacked along a leading axis.

    Calling it returns the weights {layer: {leaf: array}} and the adapter rules as pairs (layer,
    rule).

    Attributes:
        width: the number of features that an expert reads.
    """

    num_experts: int
    width: int
    form: ExpertForm
    options: LayerOptions

    @nn.compact
    def __call__(self) -> tuple[Weights, AdapterRules]:
        weights, adapters = {}, []
        for layer in self.form.layers(self.width):
            linear = ExpertLinear(
                self.num_experts,
                layer.inputs,
                layer.features,
                self.options,
                use_bias=self.form.use_bias,
                axes=layer.axes,
                name=layer.name,
            )
            weights[layer.name] = linear()
            rule = self.options.adapter((*self.path, layer.name))
            if rule is not None:
                adapters.append((layer.name, rule))
        return weights, tuple(adapters)


def _statistics(
    routing: Routing,
    modality_BT: jax.Array,
    valid_BT: jax.Array,
    row_weight_B: jax.Array | None,
) -> MoEAux:
    """Return the statistics of one layer, with `dropped` still None."""
    batch, length = valid_BT.shape
    mean = partial(row_mean, routing, valid_BT, row_weight_B)
    return MoEAux(
        balance=mean(balance_loss),
        # The z-loss is that of the logits without noise: the router did not produce the noise.
        router_z=mean(lambda rows, valid_X: router_z_loss(rows.clean_XE, valid_X)),
        entropy=mean(router_entropy),
        load_ME=expert_load(routing, modality_BT.reshape(-1)),
        logits_BTE=routing.logits_XE.reshape(batch, length, -1),
        expert_BTK=routing.expert_XK.reshape(batch, length, -1),
        weight_BTK=routing.weight_XK.reshape(batch, length, -1),
        dropped=None,
    )
