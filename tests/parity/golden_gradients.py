"""Gradients by their PyTorch names, in the layout of PyTorch."""

from __future__ import annotations

import re

import numpy as np

from unimoe_jax.config import Rule
from unimoe_jax.convert.entry import Copy
from unimoe_jax.convert.plan import Resolution

PREFIX = "base_model.model."
HALF = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def stage_3(family: str) -> tuple[Rule, ...]:
    """The rules of stage 3 (spec §8): train adapters, both projections, routers and their maps.

    8e chooses its trainable parameters by the name `deepspeed_moe`. Built-in adapters of dense
    layers do not have this name, so they are frozen.
    """
    dense = (Rule(match=r"decoder/.*/mlp/.*", lr=None),) if family == "unimoe-8e" else ()
    return (
        *dense,
        Rule(match=r"decoder/.*/lora_[ab]", lr=1.0),
        Rule(match=r"decoder/.*/moe/router/.*", lr=1.0),
        Rule(match=r"vision/connector/.*", lr=1.0),
        Rule(match=r"(speech|audio)/connector/projector/.*", lr=1.0),
        Rule(match=r".*", lr=None),
    )


def recorded_name(copy: Copy) -> str:
    """The name of a source tensor inside the model that was trained."""
    group, name = copy.src.split(":", 1)
    name = name.removeprefix(PREFIX)
    expert = re.fullmatch(r"(?:mlp|rank)(\d+)", group)
    if expert is None:
        return name
    inside = f".mlp.deepspeed_moe.experts.deepspeed_experts.{expert[1]}."
    if group.startswith("rank"):
        return re.sub(r"\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.\d+\.", inside, name)
    return name.replace(".mlp.", inside)


def copies_by_name(resolution: Resolution) -> dict[str, Copy]:
    """Recorded name without prefixes -> the copy of the tensor, even if another overrides it."""
    return {recorded_name(copy): copy for copy in resolution.plan.copies}


def plain(name: str) -> str:
    """A recorded name without the parts that PEFT adds."""
    return name.removeprefix(PREFIX).replace(".default.", ".")


def recorded_gradients(
    resolution: Resolution, grads: dict[str, np.ndarray], names: set[str]
) -> dict[str, np.ndarray]:
    """Recorded name -> gradient in torch layout, for the `names` whose gradient can be computed.

    The gradients of an adapter that was merged on import follow from the gradient of the weight by
    the chain rule: W + s B A gives dA = s Bᵀ dW and dB = s dW Aᵀ.
    """
    copies = copies_by_name(resolution)

    def of(name: str) -> np.ndarray | None:
        copy = copies.get(name)
        if copy is None or copy.dst not in grads:
            return None
        return copy.backward(grads[copy.dst][copy.index])

    found = {}
    for name in names:
        value = of(plain(name))
        if value is None and (half := HALF.fullmatch(name)):
            host = of(plain(half[1] + ".weight"))
            value = None if host is None else _adapter_gradient(resolution, half, host)
        if value is not None:
            found[name] = value
    return found


def _adapter_gradient(resolution: Resolution, half: re.Match, host: np.ndarray) -> np.ndarray:
    peft = resolution.plan.groups["peft"]
    source = next(s for s in resolution.plan.notes if s.startswith("PEFT scale: "))
    scale = float(source.removeprefix("PEFT scale: "))
    a, b = (peft[f"{half[1]}.lora_{part}.weight"].read() for part in "AB")
    return scale * (b.T @ host if half[2] == "A" else host @ a.T)
