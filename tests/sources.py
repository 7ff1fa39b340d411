"""Sources of parameters in memory, and parameters that start from such sources."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from unimoe_jax.checkpoints.origins import start_of
from unimoe_jax.checkpoints.sources import ParamSource
from unimoe_jax.config import Take


def array_source(
    name: str, arrays: Mapping[str, np.ndarray], kinds: tuple[bool, ...]
) -> ParamSource:
    """A source that reads `arrays`. kinds: one flag per decoder layer: True if it has experts."""
    shapes = {path: array.shape for path, array in arrays.items()}
    return ParamSource(name, shapes, lambda path, index: arrays[path][index], kinds)


def gather(
    path: str,
    shape: tuple[int, ...],
    take: Take,
    sources: Mapping[str, ParamSource],
    kinds: tuple[bool, ...],
) -> np.ndarray:
    """The whole parameter `path` at its start under the rule `take`, in float32."""
    start = start_of(path, shape, take, sources, kinds)
    return start.read((slice(None),) * len(shape), np.dtype(np.float32))
