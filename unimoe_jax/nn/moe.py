"""The sparse mixture-of-experts layer: router, experts, dispatch, statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimoe_jax.config import MoEConfig
from unimoe_jax.nn.dispatch import moe_ffn
from unimoe_jax.nn.experts import SwiGLUExpert
from unimoe_jax.nn.linear import ExpertLinear, LayerOptions, Linear
from unimoe_jax.nn.router import (
    Routing,
    balance_loss,
    expert_load,
    route,
    router_entropy,
    router_z_loss,
)


class MoEAux(NamedTuple):
    """Statistics of one MoE layer; the stack adds a leading layers axis.

    balance, router_z, entropy: float32 scalars over valid tokens.
    load_ME: float32 [modalities, E] token slots.
    logits_BTE: float32 router logits. expert_BTK: int32 choices, E = none. Unused ones cost
    nothing: the compiler drops them.
    """

    balance: jax.Array
    router_z: jax.Array
    entropy: jax.Array
    load_ME: jax.Array
    logits_BTE: jax.Array
    expert_BTK: jax.Array
    weight_BTK: jax.Array


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
        for name, modalities in (("image", (1,)), ("video", (2,)), ("audio", (3, 4))):
            chosen = jnp.isin(modality_BT, jnp.asarray(modalities))[..., None]
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
        logits = Linear(
            self.config.num_experts,
            options,
            axes=("embed", None),
            init=nn.initializers.normal(config.init_std),
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
    """Σ_k weight_k · expert_k(x) with SwiGLU experts of width `hidden` in place of one."""

    config: MoEConfig
    hidden: int
    options: LayerOptions

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, modality_BT: jax.Array, valid_BT: jax.Array
    ) -> tuple[jax.Array, MoEAux]:
        config, options, width = self.config, self.options, x_BTD.shape[-1]
        routing = Router(config, options, name="router")(x_BTD, modality_BT, valid_BT)

        experts = Experts(config.num_experts, width, self.hidden, options, name="experts")
        weights, adapters = experts()
        expert_fn = SwiGLUExpert(options.dtype, adapters, options.train)
        seed = jnp.uint32(0)
        if options.train and any(rule.dropout for _, rule in adapters):
            seed = jax.random.bits(self.make_rng("dropout"), dtype=jnp.uint32)

        lead = x_BTD.shape[:2]
        expert_BTK = routing.expert_XK.reshape(*lead, -1)
        weight_BTK = routing.weight_XK.reshape(*lead, -1)
        y = moe_ffn(expert_fn, weights, x_BTD, expert_BTK, weight_BTK, seed, config.dispatch)
        return y, _statistics(routing, modality_BT, valid_BT)


class Experts(nn.Module):
    """Declares the stacked SwiGLU experts. Returns (weights, adapter rules by projection)."""

    num_experts: int
    width: int
    hidden: int
    options: LayerOptions

    @nn.compact
    def __call__(self):
        shapes = {
            "gate_proj": (self.width, self.hidden, ("embed", "mlp")),
            "up_proj": (self.width, self.hidden, ("embed", "mlp")),
            "down_proj": (self.hidden, self.width, ("mlp", "embed")),
        }
        weights, adapters = {}, []
        for name, (inputs, features, axes) in shapes.items():
            layer = ExpertLinear(
                self.num_experts, inputs, features, self.options, axes=axes, name=name
            )
            weights[name] = layer()
            rule = self.options.adapter((*self.path, name))
            if rule is not None:
                adapters.append((name, rule))
        return weights, tuple(adapters)


def _statistics(routing: Routing, modality_BT: jax.Array, valid_BT: jax.Array) -> MoEAux:
    valid_X, lead = valid_BT.reshape(-1), valid_BT.shape
    return MoEAux(
        balance=balance_loss(routing, valid_X),
        router_z=router_z_loss(routing.logits_XE, valid_X),
        entropy=router_entropy(routing, valid_X),
        load_ME=expert_load(routing, modality_BT.reshape(-1)),
        logits_BTE=routing.logits_XE.reshape(*lead, -1),
        expert_BTK=routing.expert_XK.reshape(*lead, -1),
        weight_BTK=routing.weight_XK.reshape(*lead, -1),
    )
