"""The sparse mixture-of-experts layer: router, experts, dispatch, statistics."""

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
from unimoe_jax.nn.moe.experts import ExpertForm
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
    """Statistics of one MoE layer; the stack adds a leading layers axis.

    balance, router_z, entropy: float32 scalars over valid tokens, see `MoE`.
    load_ME: float32 [modalities, E] token slots.
    logits_BTE: float32 router logits. expert_BTK: int32 choices, E = none. Unused ones cost
    nothing: the compiler drops them.
    dropped: float32 scalar, slots over the experts' capacity; None without a limit. What routers
    chose, here and in load_ME, holds them as well.
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
    """What an encoder or connector knows about the B images of its batch.

    modality_B: int32, see `expert_load`.
    weight_B: float32 weight of the image in router statistics; 0: it is not there.
    """

    modality_B: jax.Array
    weight_B: jax.Array

    def tokens(self, length: int) -> tuple[jax.Array, jax.Array]:
        """(modality_BT int32, valid_BT bool) of `length` tokens per image."""
        shape = (*self.weight_B.shape, length)
        spread = [a[:, None] for a in (self.modality_B, self.weight_B > 0)]
        return jnp.broadcast_to(spread[0], shape), jnp.broadcast_to(spread[1], shape)


class ModalityMap(nn.Module):
    """A linear map per modality in front of the router (Uni-MoE 8e's "FM block").

    Speech and audio share one; padding counts as text, as in the original.
    """

    options: LayerOptions

    @nn.compact
    def __call__(self, x_BTD: jax.Array, modality_BT: jax.Array) -> jax.Array:
        def mapped(name: str) -> jax.Array:
            axes = ("embed", None)
            layer = Linear(x_BTD.shape[-1], self.options, use_bias=True, axes=axes, name=name)
            return layer(x_BTD)

        out = mapped("text")
        for name in ("image", "video", "audio"):
            chosen = jnp.isin(modality_BT, jnp.asarray(MODALITY_GROUPS[name]))[..., None]
            out = jnp.where(chosen, mapped(name), out)
        return out


class Router(nn.Module):
    """Bias-free linear router; returns `Routing` over flattened tokens."""

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
        logits = Linear(
            self.config.num_experts,
            options,
            axes=("embed", None),
            init=torch_uniform if config.init == "fan_in" else normal,
            name="linear",
        )(x_BTD)
        logits = logits.reshape(-1, self.config.num_experts)
        noise = None
        if config.sample_second:
            noise = jax.random.gumbel(self.make_rng("router"), logits.shape)
        return route(
            logits, self.config.top_k, config, self.options.dtype, valid_BT.reshape(-1), noise
        )


class MoE(nn.Module):
    """Σ_k weight_k · expert_k(x) with experts of one form in place of a feed-forward layer."""

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
        """Route and compute.

        Args:
            modality_BT: int32, see `expert_load`.
            valid_BT: False: no expert, and not in the statistics.
            row_weight_B: statistics are taken of every row and averaged with these weights (images
                of an encoder); None: over all tokens of the batch at once.
            wanted_BT: False: nobody reads the result, so no expert computes it and it is 0; the
                statistics know nothing of this. None: all are wanted.
        """
        config, options, width = self.config, self.options, x_BTD.shape[-1]
        routing = Router(config, options, name="router")(x_BTD, modality_BT, valid_BT)

        experts = Experts(config.num_experts, width, self.form, options, name="experts")
        weights, adapters = experts()
        expert_fn = self.form.function(options, adapters)
        seed = jnp.uint32(0)
        if options.train and any(rule.dropout for _, rule in adapters):
            seed = jax.random.bits(self.make_rng("dropout"), dtype=jnp.uint32)

        lead = x_BTD.shape[:2]
        expert_BTK = routing.expert_XK.reshape(*lead, -1)
        weight_BTK = routing.weight_XK.reshape(*lead, -1)
        dropped = None
        if config.capacity_factor is not None:
            expert_BTK, weight_BTK, dropped = limit_load(
                expert_BTK, weight_BTK, config.num_experts, config.capacity_factor
            )
        if wanted_BT is not None:
            expert_BTK = jnp.where(wanted_BT[..., None], expert_BTK, config.num_experts)
        way = (config.dispatch, config.exchange, options.keep_hidden)
        y = moe_ffn(expert_fn, weights, x_BTD, expert_BTK, weight_BTK, seed, *way)
        aux = _statistics(routing, modality_BT, valid_BT, row_weight_B)
        return y, aux._replace(dropped=dropped)


class Experts(nn.Module):
    """Declares the stacked experts. Returns (weights, adapter rules by linear layer)."""

    num_experts: int
    width: int
    form: ExpertForm
    options: LayerOptions

    @nn.compact
    def __call__(self):
        weights, adapters = {}, []
        for layer in self.form.layers(self.width):
            weights[layer.name] = ExpertLinear(
                self.num_experts,
                layer.inputs,
                layer.features,
                self.options,
                use_bias=self.form.use_bias,
                axes=layer.axes,
                name=layer.name,
            )()
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
    lead = valid_BT.shape
    mean = partial(row_mean, routing, valid_BT, row_weight_B)
    return MoEAux(
        balance=mean(balance_loss),
        router_z=mean(lambda rows, valid_X: router_z_loss(rows.clean_XE, valid_X)),
        entropy=mean(router_entropy),
        load_ME=expert_load(routing, modality_BT.reshape(-1)),
        logits_BTE=routing.logits_XE.reshape(*lead, -1),
        expert_BTK=routing.expert_XK.reshape(*lead, -1),
        weight_BTK=routing.weight_XK.reshape(*lead, -1),
        dropped=None,
    )
