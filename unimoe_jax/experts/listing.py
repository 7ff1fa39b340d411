"""`list`: where a checkpoint has experts, how many and how large, and what they were made of."""

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
    """A table of the modules with experts, and one of the experts.

    Args:
        compare: read all experts, and say how far each has moved from expert 0.
    """
    opened = open_experts(path.name, path)
    yield f"{'module':<12}{'layers':<28}{'experts':>8}{'top-k':>7}{'each':>16}{'all':>18}"
    modules = [module for module in MODULES if opened.num_experts(module)]
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
                line += f"  largest difference from expert 0: {_apart(opened, module, expert):.3g}"
            yield line


def _origins(opened: Opened, module: ModuleName) -> list[str]:
    """Of every expert: what this program noted, else where the stage began; empty: unknown."""
    manifest = opened.checkpoint.manifest
    if noted := manifest.get("experts", {}).get(module):
        return noted
    takes = [Take.model_validate(take) for take in manifest.get("init", ())]
    if not takes:
        return []
    params, layers = opened.checkpoint.params, opened.moe_layers
    of = {path: layer_parts(path, param.shape, layers)[0][1] for path, param in params.items()}
    chosen = [
        origin_of(path, takes)
        for path, member in of.items()
        if member.module == module and member.expert is not None
    ]
    count = opened.num_experts(module)
    return [", ".join(dict.fromkeys(_origin(take, e) for take in chosen)) for e in range(count)]


def _origin(take: Take, expert: int) -> str:
    if take.experts:
        return take.experts[expert]
    return take.upcycle or ("fresh" if take.source == "fresh" else f"{take.source} expert {expert}")


def _expert_members(opened: Opened, module: ModuleName) -> list[LayerPart]:
    return [m for m in opened.members if m.module == module and m.expert is not None]


def _module_line(opened: Opened, module: ModuleName) -> str:
    found = _expert_members(opened, module)
    layers = list(dict.fromkeys((m.stack, m.layer) for m in found))
    text = str(len(layers))
    if module == "decoder":
        chosen = sorted(layer for _, layer in layers)
        text = f"{len(chosen)} of {len(opened.moe_layers)}: {_short(chosen)}"
    size = sum(int(np.prod(opened.part(m).shape[1:], dtype=np.int64)) for m in found)
    count = opened.num_experts(module)
    moe = moe_of(opened.config, module)
    top_k = MoEConfig.model_validate(moe).top_k if moe else "–"
    return f"{module:<12}{text:<28}{count:>8}{top_k!s:>7}{size:>16,}{count * size:>18,}"


def _short(numbers: list[int]) -> str:
    """0 1 2 3 -> 0–3; others as they are."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2:
        return f"{numbers[0]}–{numbers[-1]}"
    shown = " ".join(map(str, numbers[:6]))
    return shown + (" …" if len(numbers) > 6 else "")


def _apart(opened: Opened, module: ModuleName, expert: int) -> float:
    largest = 0.0
    for member in _expert_members(opened, module) if expert else ():
        first, other = (opened.part(member, e).read().astype(np.float32) for e in (0, expert))
        largest = max(largest, float(np.max(np.abs(first - other), initial=0.0)))
    return largest
