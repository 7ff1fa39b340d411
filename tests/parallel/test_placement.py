"""Host arrays, shapes and batches on a mesh, and the bytes that a device holds of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.config import MeshConfig
from unimoe_jax.data.batch import ArraySpec
from unimoe_jax.parallel.placement import batch_structs, bytes_per_device, place, to_devices
from unimoe_jax.parallel.sharding import make_mesh, param_sharding, replicated, use_mesh


def test_a_batch_is_sharded_by_its_first_axis(devices):
    mesh = make_mesh(MeshConfig(data=4, tensor=2), devices)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    with use_mesh(mesh):
        batch = to_devices({"x": rows, "missing": None}, mesh)
        structs = batch_structs(mesh, {"x": ArraySpec((8, 3), np.dtype(np.int32)), "missing": None})
    np.testing.assert_array_equal(batch["x"], rows)
    assert batch["x"].sharding.shard_shape((8, 3)) == (2, 3)
    assert structs["x"].sharding == batch["x"].sharding
    assert batch["missing"] is None
    assert structs["missing"] is None


def test_bytes_per_device_of_structs_and_arrays(devices):
    """Sharded over 4 devices: 2 · 6 · 4 bytes. Replicated: 3 · 2 bytes."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), devices)
    with use_mesh(mesh):
        sharding = param_sharding(mesh, "w", (8, 6), ("embed", None))
        struct = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding)
        array = place(np.zeros(3, jnp.bfloat16), replicated(mesh))
    assert bytes_per_device(struct) == 48
    assert bytes_per_device({"w": struct, "b": array, "none": None}) == 48 + 6
    local = [
        shard.data.nbytes for shard in place(np.zeros((8, 6), "f4"), sharding).addressable_shards
    ]
    assert local == [48] * 8
