"""`inspect` and `verify`: what a checkpoint holds, and whether two hold the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from unimoe_jax.convert.opening import Checkpoint, Parameter
from unimoe_jax.convert.reader import np_dtype

EXPERT = "/moe/experts/"


def inspect_lines(checkpoint: Checkpoint) -> Iterator[str]:
    """A tree of parameters with shapes, dtypes and sizes; totals, and what a token touches."""
    total = active = size = 0
    opened: list[str] = []
    for path, parameter in checkpoint.params.items():
        *folders, name = path.split("/")
        common = 0
        while common < min(len(opened), len(folders)) and opened[common] == folders[common]:
            common += 1
        for depth in range(common, len(folders)):
            yield "  " * depth + folders[depth] + "/"
        opened = folders
        count = int(np.prod(parameter.shape, dtype=np.int64))
        nbytes = count * np_dtype(parameter.dtype).itemsize
        shape = "×".join(map(str, parameter.shape)) or "scalar"
        yield f"{'  ' * len(folders)}{name}  {shape}  {parameter.dtype}  {nbytes:,} B"
        total, size = total + count, size + nbytes
        active += round(count * _share(checkpoint.config, path)) if EXPERT in path else count
    yield f"total {total:,} parameters, {size:,} bytes; active per token {active:,}"


def _share(config: Mapping[str, Any], path: str) -> float:
    """top_k / num_experts of the module to which an expert's parameter belongs."""
    found: Any = config
    for name in path.split("/"):
        if moe := found.get("moe"):
            return moe["top_k"] / moe["num_experts"]
        found = found.get(name) or {}
    return 1.0  # no settings are known: every parameter counts


def chunks(parameter: Parameter) -> Iterator[tuple[int, ...]]:
    """Leading indices that cut a parameter into slices of one layer (and expert)."""
    lead = max(0, min(2, len(parameter.shape) - 2))
    return iter(np.ndindex(parameter.shape[:lead]))
