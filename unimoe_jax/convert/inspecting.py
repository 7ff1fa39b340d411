"""Inspect a checkpoint: its tree of parameters, their sizes, and how many a token uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from unimoe_jax.convert.opening import Checkpoint, Parameter
from unimoe_jax.convert.reader import np_dtype

EXPERT = "/moe/experts/"
"""Part of the path of every parameter that belongs to experts."""


def inspect_lines(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the tree of parameters with shapes, dtypes and sizes, then a line of totals.

    A parameter of experts counts as active with the share top_k / num_experts, because a token goes
    through top_k experts. Every other parameter is active for every token.
    """
    total = active = size = 0
    open_folders: list[str] = []
    for path, parameter in checkpoint.params.items():
        # Print the folders of this path that the path before it does not have.
        *folders, name = path.split("/")
        common = _common_length(open_folders, folders)
        for depth in range(common, len(folders)):
            yield "  " * depth + folders[depth] + "/"
        open_folders = folders
        # Then the parameter.
        count = int(np.prod(parameter.shape, dtype=np.int64))
        nbytes = count * np_dtype(parameter.dtype).itemsize
        shape = "×".join(map(str, parameter.shape)) or "scalar"
        yield f"{'  ' * len(folders)}{name}  {shape}  {parameter.dtype}  {nbytes:,} B"
        total, size = total + count, size + nbytes
        if EXPERT in path:
            active += round(count * _active_share(checkpoint.config, path))
        else:
            active += count
    yield f"total {total:,} parameters, {size:,} bytes; active per token {active:,}"


def _common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Number of names at the start of `a` and `b` that are equal."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def _active_share(config: Mapping[str, Any], path: str) -> float:
    """top_k / num_experts of the module to which an expert's parameter belongs."""
    # The path of a parameter follows the settings: "vision/encoder/…" has config.vision.encoder.
    settings: Any = config
    for name in path.split("/"):
        if moe := settings.get("moe"):
            return moe["top_k"] / moe["num_experts"]
        settings = settings.get(name) or {}
    return 1.0  # the settings are unknown, so every parameter counts


def chunks(parameter: Parameter) -> Iterator[tuple[int, ...]]:
    """Yield the leading indices that cut a parameter into matrices of one layer and expert.

    Example: shape (2, 3, 8, 8) yields (0, 0), (0, 1), … (1, 2); shape (8, 8) yields ().
    """
    index_axes = max(0, min(2, len(parameter.shape) - 2))
    return iter(np.ndindex(parameter.shape[:index_axes]))
