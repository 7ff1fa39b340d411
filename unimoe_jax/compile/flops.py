"""The products that a training step needs, counted on its mathematics, not on a program.

The model is taken with dense feed-forward layers and without recomputation; a token that visits
top_k experts needs as much as one that visits a layer top_k times as wide. Frozen weights need no
gradient, and the trace leaves it out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from unimoe_jax.config import ModelConfig, StageConfig
from unimoe_jax.config.stage_settings import StageSettings
from unimoe_jax.data.batch import Batch
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.parallel.placement import structs
from unimoe_jax.params.paths import first_match, flatten, nest
from unimoe_jax.stages.losses import token_nll


class Needed(NamedTuple):
    """FLOPs, two per multiply-add: in all, and of those the grouped experts' and the head's, which
    programs compute in loops whose length depends on the data. The head's count every position; a
    program computes those with a target."""

    total: float
    experts: float
    head: float


def step_flops(settings: StageSettings, spec: Batch) -> Needed:
    """FLOPs of loss and gradient for one batch of `spec`, summed over all devices."""
    model, stage = settings.model, settings.config
    dense = _without_remat(model.with_experts(()))
    base = _gradient_flops(dense, stage, spec)
    twice = dense.decoder.model_copy(update={"vocab_size": 2 * dense.decoder.vocab_size})
    head = _gradient_flops(dense.model_copy(update={"decoder": twice}), stage, spec) - base
    total, in_experts = base, 0.0
    for name, experts in model.experts().items():
        if name == "connector":  # counted as a dense one: a thousandth of the whole
            continue
        layers = model.decoder.moe_layers() if name == "decoder" else (True,)
        once = _gradient_flops(_widened(dense, name, 2), stage, spec) - base
        once *= sum(layers) / len(layers)
        total += (experts.top_k - 1) * once
        if experts.dispatch == "grouped":
            in_experts += experts.top_k * once
    return Needed(total, in_experts, head)


def _without_remat(model: ModelConfig) -> ModelConfig:
    parts: dict[str, Any] = {"decoder": model.decoder.model_copy(update={"remat": False})}
    for name in ("vision", "speech", "audio"):
        part = getattr(model, name)
        if part:
            encoder = part.encoder.model_copy(update={"remat": False})
            parts[name] = part.model_copy(update={"encoder": encoder})
    return model.model_copy(update=parts)


def _widened(model: ModelConfig, module: str, factor: int) -> ModelConfig:
    """The dense `model` with the feed-forward layers of `module` `factor` times as wide."""
    if module == "decoder":
        decoder = model.decoder
        changed = decoder.model_copy(update={"mlp_dim": factor * decoder.mlp_dim})
        return model.model_copy(update={"decoder": changed})
    encoder = model.vision.encoder
    changed = encoder.model_copy(update={"mlp_dim": factor * encoder.mlp_dim})
    return model.model_copy(update={"vision": model.vision.model_copy(update={"encoder": changed})})


def _gradient_flops(config: ModelConfig, stage: StageConfig, spec: Batch) -> float:
    model = UniMoE(config, LayerOptions(dtype=jnp.bfloat16, lora=config.lora, train=True))
    batch = structs(spec)
    rngs = {name: jax.random.key(0) for name in ("params", "dropout", "router")}
    shapes = flatten(nn.meta.unbox(jax.eval_shape(model.init, rngs, batch)["params"]))

    def trains(path: str) -> bool:
        at = first_match(stage.train, path, lambda rule: rule.match)
        return at is not None and stage.train[at].lr is not None

    trained = {path: leaf for path, leaf in shapes.items() if trains(path)}
    frozen = {path: leaf for path, leaf in shapes.items() if path not in trained}

    def loss(trained, frozen, batch):
        out = model.apply({"params": nest({**frozen, **trained})}, batch, rngs=rngs)
        return jnp.sum(batch.weight_BT * token_nll(out.logits_BTV, batch.target_BT))

    return jaxpr_flops(jax.make_jaxpr(jax.grad(loss))(trained, frozen, batch))


def jaxpr_flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """FLOPs of the products in `jaxpr`, without loops whose length depends on the data and kernels:
    what attention does on packed rows (hlo_stats.py keeps them apart as well)."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2.0 * equation.outvars[0].aval.size * depth
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * equation.outvars[0].aval.size * kernel.size / outputs
        elif name not in ("while", "pallas_call"):
            inner = [jaxpr_flops(sub) for sub in _inner(params)]
            if name == "cond":
                total += max(inner)
            else:
                total += params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)
    return total


def _inner(params: dict) -> list:
    found = []
    for value in params.values():
        values = value if isinstance(value, tuple | list) else (value,)
        found += [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return found
