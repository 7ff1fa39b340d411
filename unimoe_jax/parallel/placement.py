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

    Example: two processes hold data shards 0, 1 and 2, 3 of a batch with three rows per shard. Each
    passes an array of six rows and gets the global array of twelve rows, of which its devices hold
    their rows.

    Args:
        batch: any tree of host arrays whose first axis holds this process's data shards, in order.

    Returns:
        The same tree of global arrays; their first axis is sharded over all data shards.
    """
    local_shards, shards = own_data_shards(mesh), data_shards(mesh)

    def put(array: np.ndarray) -> jax.Array:
        rows = len(array) // len(local_shards)

        def rows_of_device(index: Any) -> np.ndarray:
            """The rows of `array` that the global `index` of a device stands for."""
            shard = (index[0].start or 0) // rows
            start = local_shards.index(shard) * rows
            return array[start : start + rows]

        shape = (rows * shards, *array.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, array.ndim), rows_of_device)

    return jax.tree.map(put, batch)


def batch_structs(mesh: Mesh, spec: Any) -> Any:
    """Shape structs of a batch of `ArraySpec`s, sharded over the data shards."""
    return structs(spec, lambda rank: batch_sharding(mesh, rank))


def structs(spec: Any, sharding: Callable[[int], Any] = lambda rank: None) -> Any:
    """Turn a tree of specs (anything with shape and dtype) into jax's shape structs.

    None stays None. `sharding` gives the sharding of an array of a rank.
    """
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding(len(s.shape))),
        spec,
        # An ArraySpec is a tuple, which jax would take for a part of the tree.
        is_leaf=lambda s: hasattr(s, "shape") and hasattr(s, "dtype"),
    )


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Put a host array on the mesh; every process must hold the same value."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def bytes_per_device(tree: Any) -> int:
    """Bytes that each device holds of a tree of arrays or shape structs with shardings.

    Example: float32 [8, 6], whose first axis is sharded over 4 devices, takes 2 · 6 · 4 = 48 bytes.
    """
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
