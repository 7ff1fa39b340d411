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


def compare(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """One line per difference; nothing when both hold the same numbers under the same paths."""
    for path in sorted(set(a.params) | set(b.params)):
        if path not in a.params or path not in b.params:
            yield f"{path}: only in {a.path if path in a.params else b.path}"
            continue
        left, right = a.params[path], b.params[path]
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            yield f"{path}: {left.shape} {left.dtype} against {right.shape} {right.dtype}"
        if left.shape != right.shape:
            continue
        worst = 0.0
        for index in chunks(left):
            x, y = (p.read(index) for p in (left, right))
            if x.dtype == y.dtype and x.tobytes() == y.tobytes():
                continue
            difference = np.abs(x.astype(np.float64) - y.astype(np.float64))
            worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max()))
        if worst:
            yield f"{path}: largest difference {worst:.3g}"
