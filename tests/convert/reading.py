"""Read all parameters of an import into memory, without writing a checkpoint."""

from __future__ import annotations

import numpy as np

from unimoe_jax.convert.plan import Resolution, read_slice
from unimoe_jax.convert.reader import np_dtype


def read_all(resolution: Resolution) -> dict[str, np.ndarray]:
    """Path -> array, for every parameter of a small model."""
    params = {}
    for path, target in resolution.targets.items():
        params[path] = np.empty(target.shape, np_dtype(target.dtype))
        for index, copy in target.fills.items():
            # An assignment to an array casts: a slice may have the source's dtype.
            params[path][index] = read_slice(resolution.plan, copy)
    return params
