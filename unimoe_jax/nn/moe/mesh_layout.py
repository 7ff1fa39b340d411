"""How one call of dispatch is laid out on the mesh: which axes cut tokens, experts and weights.

Everything here is static. `call_layout` decides it while the call is traced, and dispatch.py passes
it through its custom gradient as a static argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from unimoe_jax.nn.moe import exchange, grouped
from unimoe_jax.nn.moe.exchange import ExchangeForm
from unimoe_jax.nn.moe.exchange_rounds import Group
from unimoe_jax.nn.moe.experts import ExpertFunction
from unimoe_jax.nn.moe.grouped import Blocks, Routed
from unimoe_jax.parallel.sharding import (
    ShardingError,
    current_mesh,
    current_platform,
    mesh_axes,
    param_sharding,
)

ExchangeSetting = Literal["auto"] | ExchangeForm

Axes = tuple[str, ...]
"""Names of mesh axes."""


@dataclass(frozen=True)
class WeightLayout:
    """How one array of the experts' weights is laid out on the mesh.

    spec: the specification of the whole array.
    gathered: pairs (dimension, mesh axes) along which the shards are gathered for use.
    shared: mesh axes whose devices hold the same values. Their gradients are summed.
    add_once: whether this is a bias of the result while the hidden width is cut. The devices of
        `CallLayout.hidden` sum their results, so only the first of them may add it.
    """

    spec: PartitionSpec
    gathered: tuple[tuple[int, Axes], ...]
    shared: Axes
    add_once: bool


@dataclass(frozen=True)
class CallLayout:
    """The static facts of one call of dispatch.

    blocks: how the rows of an expert are processed.
    mesh: None on one device; the fields below then have no meaning, except for `keep_hidden`.
    batch: mesh axes that cut tokens.
    hidden: mesh axes that cut the hidden width of the experts.
    expert_only: mesh axes that cut experts but not tokens. Their devices have the same tokens, and
        each computes those of its experts.
    group: the devices that exchange tokens. None if every device has the tokens of its experts, or
        has all experts.
    form: how the group exchanges tokens.
    weights: the layouts of the arrays of the weights, in the order of `jax.tree.leaves`.
    keep_hidden: see `dispatch.moe_ffn`.
    """

    expert_fn: ExpertFunction
    blocks: Blocks
    mesh: AbstractMesh | None = None
    batch: Axes = ()
    hidden: Axes = ()
    expert_only: Axes = ()
    group: Group | None = None
    form: ExchangeForm = "gather"
    weights: tuple[WeightLayout, ...] = ()
    keep_hidden: bool = False

    @property
    def summed_axes(self) -> Axes:
        """The mesh axes over which partial results are summed."""
        return self.expert_only + self.hidden

    @property
    def kept_spec(self) -> PartitionSpec:
        """The specification of what is kept for the backward pass: [sorted slots, F] per device."""
        return PartitionSpec(self.batch + self.expert_only or None, self.hidden or None)


def call_layout(
    expert_fn: ExpertFunction,
    weights: Any,
    rows: Routed,
    form: ExchangeSetting,
    keep_hidden: bool,
) -> CallLayout:
    """Decide the layout of a call from the current mesh and its rules.

    Example: 8 experts, and a mesh with fsdp = 2 and expert = 2 that cuts the batch over both. The
    kernels [8,D,F] are cut by experts and by D, so `gathered` of a kernel is its dimension 1 over
    fsdp. The two devices along the expert axis hold 4 experts each and form a group that exchanges
    tokens.

    Raises:
        ShardingError: the mesh cuts experts over some axes that cut the batch and over some that do
            not, or it does not divide the weights.
    """
    experts = jax.tree.leaves(weights)[0].shape[0]
    mesh, slots = current_mesh(), rows.expert_XK.size
    if mesh is None or mesh.size == 1:
        blocks = grouped.blocks_for(slots // experts, current_platform())
        return CallLayout(expert_fn, blocks, keep_hidden=keep_hidden)

    # Find the mesh axes that cut tokens, experts and the hidden width.
    batch, expert_axes = mesh_axes("batch"), mesh_axes("expert")
    exchanges = set(expert_axes) <= set(batch)
    if set(expert_axes) & set(batch) and not exchanges:
        raise ShardingError(
            f"experts are cut over the mesh axes {expert_axes}, but the batch is cut over {batch}, "
            "which has only some of them; allowed: all or none of the experts' axes; change "
            "mesh.rules.expert or mesh.rules.batch"
        )
    axes = expert_fn.axes()
    hidden = _hidden_axes(axes, batch)
    layouts = tuple(
        _weight_layout(path, w.shape, axes, mesh, batch, hidden)
        for path, w in jax.tree_util.tree_leaves_with_path(weights)
    )

    # Choose the blocks by the mean load of an expert. A device receives the slots of `shards`
    # devices, but only for its share 1 / `shards` of the experts.
    shards, tokens = _devices(mesh, expert_axes), rows.row_X.size // _devices(mesh, batch)
    top_k, experts_here = rows.expert_XK.shape[-1], experts // shards
    blocks = grouped.blocks_for(tokens * top_k // experts_here, current_platform())
    layout = CallLayout(
        replace(expert_fn, hidden_cut=hidden),
        blocks,
        mesh,
        batch=batch,
        hidden=hidden,
        weights=layouts,
    )
    if not expert_axes or not exchanges:
        return replace(layout, expert_only=expert_axes, keep_hidden=keep_hidden)

    # Tokens have to be exchanged: choose the form by the tokens that move.
    capacity = exchange.pair_capacity(tokens, shards, experts_here, top_k)
    form = exchange.cheapest_form(tokens, capacity) if form == "auto" else form
    group = Group(expert_axes, shards, experts_here, everywhere=batch, capacity=capacity)
    return replace(layout, group=group, form=form)


def _devices(mesh: AbstractMesh, axes: Axes) -> int:
    """Return the number of devices along some mesh axes."""
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def _hidden_axes(axes: Mapping[str, tuple[str, str]], batch: Axes) -> Axes:
    """Return the mesh axes that cut the hidden width, or () if it cannot stay cut.

    It can stay cut only if exactly one layer reads it and the result of the expert is not cut.
    Every device then computes its share of a sum. The mesh axes must not cut the batch as well.
    """
    hidden = mesh_axes("mlp")
    layers_that_read = sum(first == "mlp" for first, _ in axes.values())
    result_is_hidden = list(axes.values())[-1][1] == "mlp"
    if layers_that_read != 1 or set(hidden) & set(batch) or result_is_hidden:
        return ()
    return hidden


def _weight_layout(
    path: tuple[Any, ...],
    shape: tuple[int, ...],
    axes: Mapping[str, tuple[str, str]],
    mesh: AbstractMesh,
    batch: Axes,
    hidden: Axes,
) -> WeightLayout:
    """Return the layout of the array at `path`, which is (linear layer, leaf).

    Raises:
        ShardingError: the mesh does not divide the array.
    """
    layer, leaf = (key.key for key in path)
    first, last = axes[layer]
    logical = {
        "kernel": ("expert", first, last),
        "bias": ("expert", last),
        "lora_a": ("expert", first, "rank"),
        "lora_b": ("expert", "rank", last),
    }[leaf]
    # Gather every cut dimension, except for the experts and for a hidden width that stays cut.
    gathered = tuple(
        (dim, mesh_axes(name))
        for dim, name in enumerate(logical)
        if dim and mesh_axes(name) and not (hidden and name == "mlp")
    )
    # Devices hold the same values along the batch axes that cut neither this array nor the experts,
    # but they see other tokens. Along `hidden` they hold the same values of an array that has no
    # hidden width, and each computes a part of its gradient.
    scattered = {axis for _, names in gathered for axis in names}
    expert_axes = mesh_axes("expert")
    shared = tuple(axis for axis in batch if axis not in expert_axes and axis not in scattered)
    if "mlp" not in logical:
        shared += hidden
    add_once = bool(hidden) and leaf == "bias" and last != "mlp"
    sharding = param_sharding(mesh, f"moe/experts/{layer}/{leaf}", shape, logical)
    return WeightLayout(sharding.spec, gathered, shared, add_once)
