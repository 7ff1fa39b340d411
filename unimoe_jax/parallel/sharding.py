"""The mesh, the table of logical axes, and shardings: the only module that names mesh axes.

Every parameter names logical axes where it is declared, and one table maps them to mesh axes. An
unknown name, a rank that does not match, two dimensions on one mesh axis and a size that does not
divide are errors that name the parameter. flax would silently replicate such a parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from unimoe_jax.config import MeshConfig

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
EXPERT_AXIS = "expert"

MeshAxes = str | tuple[str, ...] | None
"""The mesh axes over which a logical axis is sharded: one, several, or none."""
AnyMesh = Mesh | AbstractMesh

# The default table, logical axis -> mesh axes. A run file can change entries (`mesh.rules`).
RULES: Mapping[str, MeshAxes] = {
    "batch": BATCH_AXES,
    "tokens": None,
    "embed": "fsdp",
    # Width of the model inside expert weights. It has its own rule because the expert axis is
    # already taken there, while `embed` may use that axis as well.
    "expert_embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "expert": EXPERT_AXIS,
    "rank": None,
    "layers": None,
}

_rules: ContextVar[Mapping[str, MeshAxes]] = ContextVar("rules", default=RULES)


class ShardingError(ValueError):
    """Raised for a parameter or activation that the mesh and the table cannot shard."""


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Size of every mesh axis on this number of devices; an axis of -1 gets the remaining devices.

    Example: data = -1 and fsdp = 2 on 8 devices give {data: 4, fsdp: 2, expert: 1, tensor: 1}.

    Raises:
        ShardingError: the product of the axes is not the number of devices.
    """
    sizes = _filled_sizes(config, devices)
    if int(np.prod(list(sizes.values()))) == devices:
        return sizes
    # Name the axes that the user has set, without an axis of -1, because these have to change.
    configured = {axis: getattr(config, axis) for axis in MESH_AXES}
    named = {axis: size for axis, size in configured.items() if size > 1} or {"data": config.data}
    keys = ", ".join(f"mesh.{axis}={size}" for axis, size in named.items())
    product = int(np.prod(list(named.values())))
    if -1 in configured.values():
        divisors = " | ".join(str(n) for n in range(1, devices + 1) if not devices % n)
        needs, allowed = f"needs a multiple of {product}", f"a product of {divisors}"
    else:
        needs = f"that is {product}"
        allowed = f"a product of {devices}, or -1 for one axis, which takes the remaining devices"
    raise ShardingError(f"{keys}: {needs} devices, but there are {devices}; allowed: {allowed}")


def _filled_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Sizes of the mesh axes, with -1 replaced by the devices that the other axes leave."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    free_axis = next((axis for axis, size in sizes.items() if size == -1), None)
    if free_axis:
        fixed = int(np.prod([size for size in sizes.values() if size != -1]))
        sizes[free_axis] = max(1, devices // fixed)
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The configured mesh over `devices` (default: all).

    Raises:
        ShardingError: the product of the axes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    shape = [sizes[axis] for axis in MESH_AXES]
    if devices[0].platform == "tpu":
        # Order the devices so that neighbours on a mesh axis are neighbours in the machine.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    # With Auto axes, sharding constraints are hints to the compiler. jax.make_mesh would choose
    # Explicit axes.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def planned_mesh(config: MeshConfig) -> AbstractMesh:
    """A mesh of the configured sizes without devices, to plan a run on machines that are not here.

    An axis of -1 is filled with the devices of this machine.
    """
    sizes = _filled_sizes(config, jax.device_count())
    types = (AxisType.Auto,) * len(MESH_AXES)
    return AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=types)


@contextlib.contextmanager
def use_mesh(mesh: AnyMesh, changes: Mapping[str, MeshAxes] | None = None) -> Iterator[AnyMesh]:
    """Make `mesh` and the table current for `shard`, `spec_for` and `shard_map`.

    Args:
        changes: entries that replace those of `RULES` (the setting `mesh.rules`).

    Raises:
        ShardingError: an entry names an unknown axis, or a mesh axis twice.
    """
    changes = changes or {}
    _check_rules(changes)
    token = _rules.set({**RULES, **changes})
    planned = isinstance(mesh, AbstractMesh)
    try:
        # `with mesh:` would make flax's logical constraints do nothing, so jax.set_mesh is used.
        with jax.sharding.use_abstract_mesh(mesh) if planned else jax.set_mesh(mesh):
            yield mesh
    finally:
        _rules.reset(token)


def _check_rules(changes: Mapping[str, MeshAxes]) -> None:
    """Check that entries of the table name known axes, and every mesh axis at most once.

    Raises:
        ShardingError: they do not; the message names the entry.
    """
    unknown = sorted(set(changes) - set(RULES))
    if unknown:
        raise ShardingError(f"mesh.rules: unknown logical axes {unknown}; known: {sorted(RULES)}")
    for axis, entry in changes.items():
        names = _names(entry)
        unknown = sorted(set(names) - set(MESH_AXES))
        if unknown:
            raise ShardingError(
                f"mesh.rules.{axis}: unknown mesh axes {unknown}; known: {list(MESH_AXES)}"
            )
        if len(set(names)) < len(names):
            raise ShardingError(
                f"mesh.rules.{axis}: {list(names)}: an axis is named twice; allowed: each at most "
                "once"
            )


def _names(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of an entry of the table, or of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def current_mesh() -> AbstractMesh | None:
    """The current mesh, or None outside `use_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def current_platform() -> str:
    """The platform on which programs will run: "cpu", "gpu" or "tpu".

    It is the platform of the mesh's devices, even if the program is compiled on another machine, or
    jax's default outside `use_mesh`.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def data_shards(mesh: AnyMesh) -> int:
    """G, the number of shards of the batch."""
    return int(np.prod([mesh.shape[axis] for axis in batch_mesh_axes()]))


def batch_mesh_axes() -> tuple[str, ...]:
    """Mesh axes over which the batch is sharded."""
    return _names(_rules.get()["batch"])


def mesh_axes(logical: str) -> tuple[str, ...]:
    """Mesh axes of more than one device over which `logical` is sharded; () without a mesh."""
    mesh = current_mesh()
    names = _names(_rules.get()[logical])
    return tuple(name for name in names if mesh is not None and mesh.shape[name] > 1)


def check_divides(key: str, size: int, logical: str) -> None:
    """Check that a dimension can be sharded over the devices of a logical axis.

    Args:
        key: the setting that decides the dimension, for the message.
        size: the value of that setting.
        logical: the logical axis of the dimension.

    Raises:
        ShardingError: the devices of the axis do not divide `size`.
    """
    mesh = current_mesh()
    if mesh is None:
        return
    names = mesh_axes(logical)
    shards = int(np.prod([mesh.shape[name] for name in names])) if names else 1
    if size % shards:
        axes = " x ".join(f"mesh.{name} = {mesh.shape[name]}" for name in names)
        divisors = " | ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ShardingError(
            f"{key} = {size} does not divide over {axes}; allowed: {divisors} devices there, or a "
            f"multiple of {shards} for {key}"
        )


def spec_for(axes: Sequence[str | None], name: str = "array") -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes under the current table.

    Example: under the default table, ("expert", "embed", "mlp") on a mesh with expert = 2, fsdp = 2
    and tensor = 1 becomes PartitionSpec("expert", "fsdp", None).

    Args:
        axes: one logical axis per dimension; None: the dimension is not sharded.
        name: the array, for messages.

    Raises:
        ShardingError: a logical axis is unknown, or two dimensions are on the same mesh axis.
    """
    rules = _rules.get()
    mesh = current_mesh()
    entries: list[MeshAxes] = []
    used: set[str] = set()
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ShardingError(f"{name}: unknown logical axis {axis!r}; known: {sorted(rules)}")
        names = _names(rules[axis]) if axis is not None else ()
        clash = used & set(names)
        if clash:
            # Name every logical axis that uses the mesh axis, because any of them can be changed.
            users = [
                other
                for other in dict.fromkeys(axes)
                if other is not None and clash & set(_names(rules.get(other)))
            ]
            raise ShardingError(
                f"{name}: axes {tuple(axes)} put two dimensions on {sorted(clash)}; change "
                + " or ".join(f"mesh.rules.{axis}" for axis in users)
            )
        used |= set(names)
        # Leave mesh axes of size 1 out, so that a spec shows only what is really sharded.
        names = tuple(n for n in names if mesh is None or mesh.shape[n] > 1)
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def param_sharding(
    mesh: AnyMesh,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str | None],
) -> NamedSharding:
    """The sharding of a parameter, checked against its shape.

    Args:
        axes: one logical axis per dimension.

    Raises:
        ShardingError: the number of axes is not the rank, or a mesh axis does not divide a
            dimension; see also `spec_for`.
    """
    if len(axes) != len(shape):
        raise ShardingError(
            f"{name}: shape {tuple(shape)} has {len(shape)} axes, but the logical axes are {axes}"
        )
    spec = spec_for(axes, name)
    for dim, (size, entry) in enumerate(zip(shape, spec, strict=True)):
        names = _names(entry)
        shards = int(np.prod([mesh.shape[n] for n in names])) if names else 1
        if size % shards:
            raise ShardingError(
                f"{name}: dimension {dim} ({axes[dim]}) of size {size} does not divide by the "
                f"{shards} shards of mesh axis {entry}"
            )
    return NamedSharding(mesh, spec)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask the compiler to shard activation `x` by logical `axes`; `x` itself outside `use_mesh`.

    Raises:
        ShardingError: the number of axes is not the rank of `x`; see also `spec_for`.
    """
    if current_mesh() is None:
        return x
    if len(axes) != x.ndim:
        raise ShardingError(f"activation of shape {x.shape} has not the rank of its axes {axes}")
    return jax.lax.with_sharding_constraint(x, spec_for(axes, "activation"))


def batch_sharding(mesh: Mesh, rank: int, *, leading: int = 0) -> NamedSharding:
    """The sharding of a batch array of `rank` dimensions: only dimension `leading` is sharded."""
    with_batch = [None] * leading + ["batch"] + [None] * (rank - leading - 1)
    return NamedSharding(mesh, spec_for(with_batch, "batch"))


def own_data_shards(mesh: Mesh) -> tuple[int, ...]:
    """Numbers of the data shards that this process's devices hold, in order, from 0 to G − 1.

    Processes that shard only parameters among themselves, and not the batch, hold the same shards.
    """
    # Shard an array with one element per data shard: a device's slice is its data shard.
    indices = batch_sharding(mesh, 1).addressable_devices_indices_map((data_shards(mesh),))
    return tuple(sorted({index[0].start or 0 for index in indices.values() if index is not None}))


def one_per_device(mesh: Mesh) -> NamedSharding:
    """The sharding of a vector with one element on every device."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())
