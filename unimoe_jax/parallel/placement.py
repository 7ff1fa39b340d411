"""Place host arrays, shapes and batches on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unimoe_jax.parallel.sharding import batch_sharding, data_shards, own_data_shards

Tree = TypeVar("Tree")


def to_devices(batch: Tree, mesh: Mesh) -> Tree:
    """Build global arrays from this process's part of a batch.

    batch: any tree of host arrays whose first axis holds the data shards of this process, in order.
    Returns the same tree of global arrays; their first axis is sharded over all data shards.
    """
    own, shards = own_data_shards(mesh), data_shards(mesh)

    def put(a: np.ndarray) -> jax.Array:
        size = len(a) // len(own)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            at = own.index((index[0].start or 0) // size) * size
            return a[at : at + size]

        shape = (size * shards, *a.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, a.ndim), part)

    return jax.tree.map(put, batch)


def batch_structs(mesh: Mesh, spec: Any) -> Any:
    """Shape structs of a batch, cut over the data shards."""
    return structs(spec, lambda rank: batch_sharding(mesh, rank))


def structs(spec: Any, sharding: Callable[[int], Any] = lambda rank: None) -> Any:
    """Array specs (shape, dtype) -> jax shape structs, None stays."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding(len(s.shape))),
        spec,
        is_leaf=lambda s: hasattr(s, "shape") and hasattr(s, "dtype"),
    )


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array on the mesh; every process must hold the same value."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
