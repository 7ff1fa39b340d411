"""Mesh, logical-axis table, sharding constraints: the only module that names mesh axes.

Every parameter names logical axes where it is declared; one table maps them to mesh axes. Unknown
names, a rank that does not match, two dimensions on one mesh axis and sizes that do not divide are
errors that name the parameter, never silent replication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unimoe_jax.config import MeshConfig

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
EXPERT_AXIS = "expert"

MeshAxes = str | tuple[str, ...] | None
RULES: Mapping[str, MeshAxes] = {
    "batch": BATCH_AXES,
    "tokens": None,
    "embed": "fsdp",
    # The same width inside experts, which leave one axis less to cut it: `embed` may then be cut by
    # the axis of the experts as well.
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
    """A parameter or activation that the mesh and the table cannot hold."""


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Size of every mesh axis on that many devices; -1 takes what the others leave.

    Raises:
        ShardingError: the product of the axes is not the number of devices.
    """
    sizes = _filled_sizes(config, devices)
    if int(np.prod(list(sizes.values()))) == devices:
        return sizes
    # Axes that nobody set, or that take what is left, are not to blame.
    given = {axis: getattr(config, axis) for axis in MESH_AXES}
    wild = next((axis for axis, size in given.items() if size == -1), None)
    named = {axis: size for axis, size in given.items() if size > 1} or {"data": config.data}
    keys = ", ".join(f"mesh.{axis}={size}" for axis, size in named.items())
    product = int(np.prod(list(named.values())))
    if wild:
        fitting = " | ".join(str(n) for n in range(1, devices + 1) if not devices % n)
        needs, allowed = f"needs a multiple of {product}", f"a product of {fitting}"
    else:
        needs = f"that is {product}"
        allowed = f"a product of {devices}, or -1 for one axis, which takes what is left"
    raise ShardingError(f"{keys}: {needs} devices, but there are {devices}; allowed: {allowed}")


def _filled_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    wild = [axis for axis, size in sizes.items() if size == -1]
    if wild:
        fixed = int(np.prod([size for size in sizes.values() if size != -1]))
        sizes[wild[0]] = max(1, devices // fixed)
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all).

    Raises:
        ShardingError: the product of the axes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    shape = [sizes[axis] for axis in MESH_AXES]
    if devices[0].platform == "tpu":  # neighbours on an axis are neighbours in the machine
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    # Auto: sharding constraints are hints to the compiler. jax.make_mesh would choose Explicit.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def planned_mesh(config: MeshConfig) -> jax.sharding.AbstractMesh:
    """A mesh of the configured sizes without devices, for planning; -1 counts as what is here."""
    sizes = _filled_sizes(config, jax.device_count())
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.sharding.AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=types)


@contextlib.contextmanager
def use_mesh(
    mesh: Mesh | jax.sharding.AbstractMesh, changes: Mapping[str, MeshAxes] | None = None
) -> Iterator[Mesh | jax.sharding.AbstractMesh]:
    """Make `mesh` and the (changed) table current for `shard`, `spec_for` and `shard_map`."""
    unknown = sorted(set(changes or {}) - set(RULES))
    if unknown:
        raise ShardingError(f"mesh.rules: unknown logical axes {unknown}; known: {sorted(RULES)}")
    for axis, entry in (changes or {}).items():
        names = (entry,) if isinstance(entry, str) else (entry or ())
        strange = sorted(set(names) - set(MESH_AXES))
        if strange:
            raise ShardingError(
                f"mesh.rules.{axis}: unknown mesh axes {strange}; known: {list(MESH_AXES)}"
            )
        if len(set(names)) < len(names):
            raise ShardingError(
                f"mesh.rules.{axis}: {list(names)}: an axis twice; allowed: each at most once"
            )
    token = _rules.set({**RULES, **(changes or {})})
    planned = isinstance(mesh, jax.sharding.AbstractMesh)
    try:
        with jax.sharding.use_abstract_mesh(mesh) if planned else jax.set_mesh(mesh):
            yield mesh
    finally:
        _rules.reset(token)


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh in force, or None outside `use_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def current_platform() -> str:
    """Where programs will run: the mesh's platform, also if compiled elsewhere, or the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def data_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """G: the number of shards that the batch is cut into."""
    return int(np.prod([mesh.shape[axis] for axis in batch_mesh_axes()]))


def batch_mesh_axes() -> tuple[str, ...]:
    """Mesh axes over which the batch is cut."""
    axes = _rules.get()["batch"]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def mesh_axes(logical: str) -> tuple[str, ...]:
    """Mesh axes of more than one device over which the table cuts `logical`; () without a mesh."""
    mesh, entry = current_mesh(), _rules.get()[logical]
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return tuple(name for name in names if mesh is not None and mesh.shape[name] > 1)


def check_divides(key: str, size: int, logical: str) -> None:
    """A setting of that `size` is cut over the devices of a logical axis: it must divide.

    Raises:
        ShardingError: it does not; `key` names the setting.
    """
    mesh, names = current_mesh(), mesh_axes(logical)
    parts = int(np.prod([mesh.shape[name] for name in names])) if names else 1
    if size % parts:
        cut = " x ".join(f"mesh.{name} = {mesh.shape[name]}" for name in names)
        fitting = " | ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ShardingError(
            f"{key} = {size} does not divide over {cut}; allowed: {fitting} devices there, or a "
            f"multiple of {parts} for {key}"
        )


def spec_for(axes: Sequence[str | None], name: str = "array") -> PartitionSpec:
    """PartitionSpec of logical `axes` under the current table.

    Raises:
        ShardingError: unknown logical axis, or two dimensions on one mesh axis.
    """
    rules = _rules.get()
    mesh = current_mesh()
    entries: list[MeshAxes] = []
    used: set[str] = set()
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ShardingError(f"{name}: unknown logical axis {axis!r}; known: {sorted(rules)}")
        entry = rules[axis] if axis is not None else None
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        clash = used & set(names)
        if clash:
            blamed = [a for a in dict.fromkeys(axes) if a in rules and clash & _on(rules[a])]
            raise ShardingError(
                f"{name}: axes {tuple(axes)} put two dimensions on {sorted(clash)}; change "
                + " or ".join(f"mesh.rules.{axis}" for axis in blamed)
            )
        used |= set(names)
        # Axes of size 1 are left out, so that a spec says what is really cut.
        names = tuple(n for n in names if mesh is None or mesh.shape[n] > 1)
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def _on(entry: MeshAxes) -> set[str]:
    """The mesh axes of an entry of the table."""
    return {entry} if isinstance(entry, str) else set(entry or ())


def param_sharding(
    mesh: Mesh | jax.sharding.AbstractMesh,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str | None],
) -> NamedSharding:
    """Sharding of a parameter, checked against its shape.

    Raises:
        ShardingError: rank mismatch or a dimension that the mesh axis does not divide.
    """
    if len(axes) != len(shape):
        raise ShardingError(f"{name}: shape {tuple(shape)} has {len(shape)} axes, named {axes}")
    spec = spec_for(axes, name)
    for dim, (size, entry) in enumerate(zip(shape, spec, strict=True)):
        names = (entry,) if isinstance(entry, str) else (entry or ())
        parts = int(np.prod([mesh.shape[n] for n in names])) if names else 1
        if size % parts:
            raise ShardingError(
                f"{name}: dimension {dim} ({axes[dim]}) of size {size} does not divide by the "
                f"{parts} shards of mesh axis {entry}"
            )
    return NamedSharding(mesh, spec)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain activation `x` to logical `axes`; identity outside `use_mesh`."""
    if current_mesh() is None:
        return x
    if len(axes) != x.ndim:
        raise ShardingError(f"activation of shape {x.shape} given axes {axes}")
    return jax.lax.with_sharding_constraint(x, spec_for(axes, "activation"))


def batch_sharding(mesh: Mesh, rank: int, *, leading: int = 0) -> NamedSharding:
    """Sharding of a batch array: dimension `leading` over the data shards, the rest whole."""
    with_batch = [None] * leading + ["batch"] + [None] * (rank - leading - 1)
    return NamedSharding(mesh, spec_for(with_batch, "batch"))


def own_data_shards(mesh: Mesh) -> tuple[int, ...]:
    """The data shards that this process's devices hold, in order; of `data_shards(mesh)`.

    Processes that cut parameters among themselves, not the batch, hold the same ones.
    """
    places = batch_sharding(mesh, 1).addressable_devices_indices_map((data_shards(mesh),))
    return tuple(sorted({index[0].start or 0 for index in places.values()}))


def one_per_device(mesh: Mesh) -> NamedSharding:
    """A vector with one element on every device."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())
