"""The mesh and the table of logical axes; errors name the axis or parameter that does not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from unimoe_jax.config import MeshConfig
from unimoe_jax.parallel.sharding import (
    MESH_AXES,
    ShardingError,
    batch_mesh_axes,
    batch_sharding,
    current_mesh,
    data_shards,
    make_mesh,
    param_sharding,
    planned_mesh,
    replicated,
    shard,
    spec_for,
    use_mesh,
)

SIZES = MeshConfig(data=2, fsdp=2, expert=2, tensor=1)


@pytest.fixture
def mesh(devices):
    with use_mesh(make_mesh(SIZES, devices)) as mesh:
        yield mesh


# ------------------------------------------------------------------------------------ mesh


def test_an_axis_of_minus_one_takes_the_remaining_devices(devices):
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert mesh.axis_names == MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "mesh.data=3.*3 devices, but there are 8"),
        (MeshConfig(data=-1, fsdp=16), "16 devices, but there are 8"),
        # The message names only the axes that are set.
        (MeshConfig(fsdp=3), r"^mesh.fsdp=3: .* 3 devices, but there are 8; .* 1 \| 2 \| 4 \| 8$"),
    ],
)
def test_sizes_that_do_not_fit(devices, config, message: str):
    with pytest.raises(ShardingError, match=message):
        make_mesh(config, devices)


def test_planned_mesh_needs_no_devices():
    mesh = planned_mesh(MeshConfig(data=64, fsdp=4, expert=8))
    assert mesh.size == 2048
    with use_mesh(mesh):
        assert data_shards(mesh) == 2048
        sharding = param_sharding(mesh, "w", (16, 8, 3), ("expert", "embed", "mlp"))
        assert sharding.shard_shape((16, 8, 3)) == (2, 2, 3)
    assert planned_mesh(MeshConfig(data=-1, fsdp=2)).shape["data"] == jax.device_count() // 2


def test_mesh_is_current_only_inside_use_mesh(devices):
    assert current_mesh() is None
    with use_mesh(make_mesh(SIZES, devices)) as mesh:
        current = current_mesh()
        assert current is not None
        assert dict(current.shape) == dict(mesh.shape)
    assert current_mesh() is None


# ----------------------------------------------------------------------------------- table


def test_specs_follow_the_table(mesh):
    assert spec_for(("expert", "embed", "mlp")) == PartitionSpec("expert", "fsdp", None)
    assert spec_for(("batch", "tokens", None)) == PartitionSpec(
        ("data", "fsdp", "expert"), None, None
    )
    assert batch_mesh_axes() == ("data", "fsdp", "expert")
    assert data_shards(mesh) == 8
    assert batch_sharding(mesh, 3, leading=1).spec == PartitionSpec(
        None, ("data", "fsdp", "expert"), None
    )
    assert replicated(mesh).is_fully_replicated


def test_table_can_be_changed(devices):
    mesh = make_mesh(SIZES, devices)
    with use_mesh(mesh, {"batch": "data", "vocab": None, "mlp": ("data", "expert")}):
        assert data_shards(mesh) == 2
        assert batch_mesh_axes() == ("data",)
        assert spec_for(("embed", "mlp")) == PartitionSpec("fsdp", ("data", "expert"))
    with use_mesh(mesh):
        assert spec_for(("embed", "mlp")) == PartitionSpec("fsdp", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": "expert"}, "experts"),
        ({"mlp": "model"}, "model"),
        ({"mlp": ("data", "x")}, "x"),
    ],
)
def test_changes_with_unknown_axes_are_refused(devices, changes, message: str):
    with (
        pytest.raises(ShardingError, match=f"unknown.*{message}"),
        use_mesh(make_mesh(SIZES, devices), changes),
    ):
        pass


def test_a_change_that_names_an_axis_twice_is_refused(devices):
    with (
        pytest.raises(ShardingError, match=r"mesh.rules.batch: \['data', 'data'\]: an axis"),
        use_mesh(make_mesh(SIZES, devices), {"batch": ("data", "data")}),
    ):
        pass


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((4, 4), ("embed", "width"), "unknown logical axis 'width'"),
        ((4, 4), ("embed",), "2 axes"),
        ((4, 4), ("embed", "embed"), "two dimensions on.*fsdp"),
        (
            (4, 4),
            ("batch", "expert"),
            r"two dimensions on.*expert.*; change mesh\.rules\.batch or mesh\.rules\.expert$",
        ),
        ((4, 3), (None, "embed"), "dimension 1 .embed. of size 3 .* 2 shards"),
        ((4, 2), ("batch", None), "size 4 .* 8 shards"),
    ],
)
def test_parameters_that_do_not_fit_are_named(mesh, shape, axes, message: str):
    with pytest.raises(ShardingError, match=f"decoder/kernel: .*{message}"):
        param_sharding(mesh, "decoder/kernel", shape, axes)


# ------------------------------------------------------------------------------ activations


def test_activations_are_constrained(mesh):
    x = jnp.zeros((8, 3, 2))
    out = jax.jit(lambda x: shard(x + 1, "batch", "tokens", "embed"), out_shardings=None)
    with pytest.raises(ShardingError, match="two dimensions"):
        out(x)
    placed = jax.jit(lambda x: shard(x + 1, "batch", "tokens", None))(x)
    assert placed.sharding.shard_shape(placed.shape) == (1, 3, 2)
    with pytest.raises(ShardingError, match="activation of shape"):
        shard(x, "batch")


def test_without_mesh_nothing_happens():
    x = jnp.zeros((2, 3))
    assert shard(x, "batch", "nonsense") is x
