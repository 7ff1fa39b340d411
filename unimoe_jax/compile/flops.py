"""The FLOPs that a training step needs, counted on its mathematics instead of on a program.

They are counted on a model with dense feed-forward layers and without recomputation. A token that
visits top_k experts needs as many FLOPs as in a dense layer that is top_k times as wide. Frozen
weights need no gradient, so the traced gradient has no products for them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimoe_jax.config import ModelConfig, StageConfig
from unimoe_jax.config.stage_settings import StageSettings
from unimoe_jax.data.batch import Batch
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.parallel.placement import structs
from unimoe_jax.params.paths import first_match, flatten, nest
from unimoe_jax.stages.losses import token_nll


class Needed(NamedTuple):
    """FLOPs, two per multiply-add.

    total: of the whole step.
    experts, head: the parts of the total in grouped experts and in the output head. Programs
    compute
        them in loops whose length depends on the data. `head` counts every position, although a
        program computes only positions that have a target.
    """

    total: float
    experts: float
    head: float


def step_flops(settings: StageSettings, spec: Batch) -> Needed:
    """FLOPs of loss and gradient for one batch of `spec`, summed over all devices."""
    model, stage = settings.model, settings.config
    dense = _without_remat(model.with_experts(()))
    base = _gradient_flops(dense, stage, spec)
    # The head's FLOPs are what a doubled vocabulary adds.
    doubled = dense.decoder.model_copy(update={"vocab_size": 2 * dense.decoder.vocab_size})
    head = _gradient_flops(dense.model_copy(update={"decoder": doubled}), stage, spec) - base
    total, in_experts = base, 0.0
    for name, experts in model.experts().items():
        # The connector counts as a dense one, because it is about a thousandth of the whole.
        if name == "connector":
            continue
        # Feed-forward layers of doubled width add the FLOPs of one expert per token in all layers.
        layers = model.decoder.moe_layers() if name == "decoder" else (True,)
        one_expert = _gradient_flops(_widened(dense, name, 2), stage, spec) - base
        one_expert *= sum(layers) / len(layers)
        total += (experts.top_k - 1) * one_expert
        if experts.dispatch == "grouped":
            in_experts += experts.top_k * one_expert
    return Needed(total, in_experts, head)


def _without_remat(model: ModelConfig) -> ModelConfig:
    """The model without recomputation in the backward pass."""
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
    assert model.vision is not None
    encoder = model.vision.encoder
    changed = encoder.model_copy(update={"mlp_dim": factor * encoder.mlp_dim})
    return model.model_copy(update={"vision": model.vision.model_copy(update={"encoder": changed})})


def _gradient_flops(config: ModelConfig, stage: StageConfig, spec: Batch) -> float:
    """FLOPs of the loss and of its gradient by the parameters that the stage trains."""
    model = UniMoE(config, LayerOptions(dtype=jnp.bfloat16, lora=config.lora, train=True))
    batch = structs(spec)
    rngs = {name: jax.random.key(0) for name in ("params", "dropout", "router")}
    shapes = flatten(nn.meta.unbox(jax.eval_shape(model.init, rngs, batch)["params"]))

    def trains(path: str) -> bool:
        number = first_match(stage.train, path, lambda rule: rule.match)
        return number is not None and stage.train[number].lr is not None

    trained = {path: leaf for path, leaf in shapes.items() if trains(path)}
    frozen = {path: leaf for path, leaf in shapes.items() if path not in trained}

    def loss(trained, frozen, batch):
        params = {"params": nest({**frozen, **trained})}
        out: Any = model.apply(params, batch, rngs=rngs)
        return jnp.sum(batch.weight_BT * token_nll(out.logits_BTV, batch.target_BT))

    return jaxpr_flops(jax.make_jaxpr(jax.grad(loss))(trained, frozen, batch))


def jaxpr_flops(jaxpr: Any) -> float:
    """FLOPs of the products in `jaxpr`.

    Kernels and loops whose length depends on the data are left out. Those are the attention of
    packed rows, which compile/hlo.py counts apart as well.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # A ClosedJaxpr holds a Jaxpr.
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
                repeats = params["length"] if name == "scan" else 1
                total += repeats * sum(inner)
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation: bodies of scans, branches, calls."""
    jaxprs = []
    for value in params.values():
        values = value if isinstance(value, tuple | list) else (value,)
        jaxprs += [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return jaxprs
