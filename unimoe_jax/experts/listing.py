"""List the experts of a checkpoint: where they are, how large, and what they were made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unimoe_jax.checkpoints.origins import origin_of
from unimoe_jax.config import MODULES, ModuleName, MoEConfig, Take
from unimoe_jax.experts.making import moe_of
from unimoe_jax.experts.opening import Opened, open_experts
from unimoe_jax.params.layer_parts import LayerPart, layer_parts


def listing(path: Path, compare: bool) -> Iterator[str]:
    """Yield a table of the modules that have experts, then one line per expert.

    Args:
        path: the checkpoint.
        compare: read all experts, and print for each how far its parameters are from expert 0.
    """
    opened = open_experts(path.name, path)
    yield f"{'module':<12}{'layers':<28}{'experts':>8}{'top-k':>7}{'each':>16}{'all':>18}"
    modules: list[ModuleName] = [module for module in MODULES if opened.num_experts(module)]
    for module in modules:
        yield _module_line(opened, module)
    if not modules:
        yield "none: every layer is dense"
    for module in modules:
        origins = _origins(opened, module)
        for expert in range(opened.num_experts(module)):
            line = f"{module} expert {expert}"
            if origins:
                line += f"  from {origins[expert]}"
            if compare:
                difference = _largest_difference(opened, module, expert)
                line += f"  largest difference from expert 0: {difference:.3g}"
            yield line


def _origins(opened: Opened, module: ModuleName) -> list[str]:
    """Where each expert comes from; empty if the manifest does not say it.

    A checkpoint that `unimoe_jax.experts` wrote lists the origin of every expert. A stage lists the
    rules by which its parameters started.
    """
    manifest = opened.checkpoint.manifest
    if names := manifest.get("experts", {}).get(module):
        return names
    takes = [Take.model_validate(take) for take in manifest.get("init", ())]
    if not takes:
        return []
    # Find the rules for all parameters of the module's experts. The first layer of a stack is
    # enough, because rules match paths.
    expert_takes = []
    for path, param in opened.checkpoint.params.items():
        layer_part = layer_parts(path, param.shape, opened.moe_layers)[0][1]
        if layer_part.module == module and layer_part.expert is not None:
            expert_takes.append(origin_of(path, takes))
    # Several rules may name the same origin; list each origin once, in order.
    return [
        ", ".join(dict.fromkeys(_origin(take, expert) for take in expert_takes))
        for expert in range(opened.num_experts(module))
    ]


def _origin(take: Take, expert: int) -> str:
    if take.experts:
        return take.experts[expert]
    if take.upcycle:
        return take.upcycle
    return "fresh" if take.source == "fresh" else f"{take.source} expert {expert}"


def _expert_parts(opened: Opened, module: ModuleName) -> list[LayerPart]:
    return [
        layer_part
        for layer_part in opened.layer_parts
        if layer_part.module == module and layer_part.expert is not None
    ]


def _module_line(opened: Opened, module: ModuleName) -> str:
    """The row of a module: its layers, number of experts, top-k, and sizes in parameters."""
    parts = _expert_parts(opened, module)
    # Several parameters belong to a layer; count each layer once.
    layers = list(dict.fromkeys((part.stack, part.layer) for part in parts))
    text = str(len(layers))
    if module == "decoder":
        numbers = sorted(layer for _, layer in layers if layer is not None)
        text = f"{len(numbers)} of {len(opened.moe_layers)}: {_short(numbers)}"
    # The first axis of a part counts the experts, so the others give the size of one expert.
    size = sum(int(np.prod(opened.part(part).shape[1:], dtype=np.int64)) for part in parts)
    count = opened.num_experts(module)
    moe = moe_of(opened.config, module)
    top_k = MoEConfig.model_validate(moe).top_k if moe else "–"
    return f"{module:<12}{text:<28}{count:>8}{top_k!s:>7}{size:>16,}{count * size:>18,}"


def _short(numbers: list[int]) -> str:
    """Shorten a list of layers: 0 1 2 3 becomes 0–3; other lists show their first six numbers."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2:
        return f"{numbers[0]}–{numbers[-1]}"
    shown = " ".join(map(str, numbers[:6]))
    return shown + (" …" if len(numbers) > 6 else "")


def _largest_difference(opened: Opened, module: ModuleName, expert: int) -> float:
    """Largest difference of any parameter of an expert from the same parameter of expert 0."""
    if expert == 0:
        return 0.0
    largest = 0.0
    for layer_part in _expert_parts(opened, module):
        # Subtract in float32: in bfloat16 the difference itself would be rounded.
        first, other = (
            opened.part(layer_part, number).read().astype(np.float32) for number in (0, expert)
        )
        largest = max(largest, float(np.max(np.abs(first - other), initial=0.0)))
    return largest
