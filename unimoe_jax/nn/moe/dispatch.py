"""Tokens to experts and back: one function, a dense reference and a sorted, sharded fast path.

Both share one signature and must agree in values and gradients. `expert_BTK == E` means "no
expert": such slots add nothing and cost nothing in the grouped path.

The grouped path is one custom gradient around everything: the experts' weights are put together
from what fsdp cut (experts, and the hidden width where a mesh axis cuts it, stay cut), tokens go to
the devices of their experts (exchange.py), experts are applied there (grouped.py), results come
back. In the backward pass gradients of weights are summed straight into the shards that hold them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from unimoe_jax.nn.moe import exchange, grouped
from unimoe_jax.nn.moe.exchange import ExchangeForm, Group
from unimoe_jax.nn.moe.experts import ExpertFunction, expert_seeds
from unimoe_jax.nn.moe.grouped import Blocks, Routed
from unimoe_jax.parallel.sharding import (
    ShardingError,
    current_mesh,
    current_platform,
    mesh_axes,
    param_sharding,
)

Exchange = Literal["auto"] | ExchangeForm


def moe_ffn(
    expert_fn: ExpertFunction,
    weights: Any,
    x_BTD: jax.Array,
    expert_BTK: jax.Array,
    weight_BTK: jax.Array,
    seed: jax.Array,
    method: Literal["grouped", "dense"] = "grouped",
    form: Exchange = "auto",
    keep_hidden: bool = False,
) -> jax.Array:
    """y[b,t] = Σ_k weight[b,t,k] · expert_fn(weights[expert[b,t,k]], x[b,t]), shape [B,T,D].

    D is the width of x, or `expert_fn.features` where that is set (a connector's experts). Nothing
    is dropped, see `limit_load`. Differentiable in weights (float32 accumulation), x and weight.

    Args:
        weights: pytree {layer: {leaf: array}} with a leading experts axis E; cast to the expert's
            dtype here.
        expert_BTK: int32 in [0, E].
        weight_BTK: float32.
        seed: uint32 scalar for adapter dropout.
        method: "grouped" or "dense" (every expert on every token, left to the compiler).
        form: how tokens reach the experts of other devices; "auto" chooses by the bytes moved.
        keep_hidden: the backward pass finds what the experts' first layers computed instead of
            computing it again (grouped, and only where no tokens are exchanged): a fifth of the
            products of a training step for T · K rows of the hidden width, twice for SwiGLU.

    Raises:
        ShardingError: the mesh cuts experts over some of the batch's axes and others, or does not
            divide their weights.
    """
    tokens = x_BTD.shape[0] * x_BTD.shape[1]
    row_BT = jnp.arange(tokens, dtype=jnp.uint32).reshape(x_BTD.shape[:2])
    rows = jax.tree.map(jnp.asarray, Routed(x_BTD, expert_BTK, weight_BTK, row_BT))
    if method == "dense":
        flat = jax.tree.map(lambda a: a.reshape(tokens, *a.shape[2:]), rows)
        return _dense(expert_fn, weights, flat, seed).reshape(*x_BTD.shape[:2], -1)
    return _sparse(_job(expert_fn, weights, rows, form, keep_hidden), weights, rows, seed)


def _dense(expert_fn: ExpertFunction, weights: Any, rows: Routed, seed: jax.Array) -> jax.Array:
    """Every expert on every token, weighted by 0 where it was not chosen: the specification."""
    x_XD, expert_XK, weight_XK, row_X = rows
    experts = jax.tree.leaves(weights)[0].shape[0]
    weights = jax.tree.map(lambda w: w.astype(expert_fn.dtype), weights)
    combine_EX = jnp.sum(
        jnp.where(expert_XK[None] == jnp.arange(experts)[:, None, None], weight_XK[None], 0.0),
        axis=-1,
    )

    def add(y_XD, expert):
        w, combine_X, own_seed = expert
        out = expert_fn(w, x_XD, row_X, own_seed).astype(jnp.float32)
        return y_XD + combine_X[:, None] * out, None

    empty = jnp.zeros((x_XD.shape[0], expert_fn.features or x_XD.shape[1]), jnp.float32)
    seed_E = expert_seeds(seed, jnp.arange(experts))
    y, _ = jax.lax.scan(add, empty, (weights, combine_EX, seed_E))
    return y.astype(x_XD.dtype)


def limit_load(
    expert_BTK: jax.Array, weight_BTK: jax.Array, experts: int, capacity_factor: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(expert, weight, number dropped, float32) with at most ⌈factor · T · K / E⌉ slots of every
    row of the batch per expert, as in arXiv 2006.16668, section 2.2, with rows as groups.

    Slots over the limit go to no expert, with weight 0; first choices before second ones, and
    earlier tokens before later ones. Rows are never cut: the result is the same on any mesh.
    """
    _, length, top_k = expert_BTK.shape
    # As written, not as its float: 1.1 · 100 is above 110, which rounded up would be one slot more.
    capacity = -(-Fraction(str(capacity_factor)) * length * top_k // experts)
    by_choice = jnp.moveaxis(expert_BTK, 2, 1)  # [B,K,T]: all first choices come first
    chosen = jax.nn.one_hot(by_choice, experts, dtype=jnp.int32).reshape(
        -1, top_k * length, experts
    )
    place = jnp.sum(jnp.cumsum(chosen, axis=1) * chosen, axis=-1).reshape(by_choice.shape)
    over = jnp.moveaxis(place > capacity, 1, 2)
    dropped = jnp.sum(over, dtype=jnp.float32)
    return jnp.where(over, experts, expert_BTK), jnp.where(over, 0.0, weight_BTK), dropped


# ---------------------------------------------------------------------------------- placement


@dataclass(frozen=True)
class _Leaf:
    """How one array of the experts' weights lies on the mesh.

    spec: of the whole array. gathered: (dimension, mesh axes) that are put together for use.
    shared: mesh axes whose devices hold the same values; their gradients are summed.
    once: a bias of the result, which one of the devices of `hidden` adds.
    """

    spec: PartitionSpec
    gathered: tuple[tuple[int, tuple[str, ...]], ...]
    shared: tuple[str, ...]
    once: bool


@dataclass(frozen=True)
class _Job:
    """What is static about one call.

    blocks: of rows. mesh: None on one device; the rest then has no meaning. batch: mesh axes that
    cut tokens. hidden: those that cut the hidden width. group: devices that exchange tokens; None
    if every device has the tokens of its experts, or all experts. held: mesh axes that cut experts
    but not tokens. keep: see `keep_hidden` of `moe_ffn`.
    """

    expert_fn: ExpertFunction
    blocks: Blocks
    mesh: AbstractMesh | None = None
    batch: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    group: Group | None = None
    form: ExchangeForm = "gather"
    leaves: tuple[_Leaf, ...] = ()
    keep: bool = False

    @property
    def summed(self) -> tuple[str, ...]:
        """Mesh axes over which partial results are summed."""
        return self.held + self.hidden

    @property
    def kept(self) -> PartitionSpec:
        """Of arrays kept for the backward pass, [sorted slots, F], of every device one."""
        return PartitionSpec(self.batch + self.held or None, self.hidden or None)


def _size(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def _job(expert_fn: ExpertFunction, weights: Any, rows: Routed, form: Exchange, keep: bool) -> _Job:
    experts = jax.tree.leaves(weights)[0].shape[0]
    mesh, slots = current_mesh(), rows.expert_XK.size
    if mesh is None or mesh.size == 1:
        blocks = grouped.blocks_for(slots // experts, current_platform())
        return _Job(expert_fn, blocks, keep=keep)
    batch, cut, hidden = mesh_axes("batch"), mesh_axes("expert"), mesh_axes("mlp")
    if set(cut) & set(batch) and not set(cut) <= set(batch):
        raise ShardingError(
            f"experts are cut over {cut}, the batch over {batch}, which holds some of these axes; "
            "allowed: all or none; change mesh.rules.expert or mesh.rules.batch"
        )
    axes = expert_fn.axes()
    # The function must meet the hidden width once, and nothing else may be cut by those axes.
    once = sum(first == "mlp" for first, _ in axes.values()) == 1
    if not once or set(hidden) & set(batch) or list(axes.values())[-1][1] == "mlp":
        hidden = ()
    leaves = tuple(
        _leaf(path, w.shape, axes, batch, cut, hidden)
        for path, w in jax.tree_util.tree_leaves_with_path(weights)
    )
    shards, tokens = _size(mesh, cut), rows.row_X.size // _size(mesh, batch)
    top_k, here = rows.expert_XK.shape[-1], experts // shards
    # A device computes the slots of `shards` devices, for one in `shards` of the experts.
    blocks = grouped.blocks_for(tokens * top_k // here, current_platform())
    job = _Job(replace(expert_fn, hidden_cut=hidden), blocks, mesh, batch, hidden, leaves=leaves)
    if not cut or not set(cut) <= set(batch):
        return replace(job, held=cut, keep=keep)
    capacity = exchange.pair_capacity(tokens, shards, here, top_k)
    form = exchange.cheapest_form(tokens, capacity) if form == "auto" else form
    return replace(job, group=Group(cut, shards, here, batch, capacity), form=form)


def _leaf(path, shape, axes, batch, cut, hidden) -> _Leaf:
    """Of the array at `path`, a layer's name and what it is there.

    Raises:
        ShardingError: the mesh does not divide it.
    """
    layer, kind = (key.key for key in path)
    first, last = axes[layer]
    logical = {
        "kernel": ("expert", first, last),
        "bias": ("expert", last),
        "lora_a": ("expert", first, "rank"),
        "lora_b": ("expert", "rank", last),
    }[kind]
    gathered = tuple(
        (dim, mesh_axes(name))
        for dim, name in enumerate(logical)
        if dim and mesh_axes(name) and not (hidden and name == "mlp")
    )
    scattered = {axis for _, names in gathered for axis in names}
    partial_here = hidden if "mlp" not in logical else ()
    shared = tuple(a for a in batch if a not in cut and a not in scattered) + partial_here
    once = bool(hidden) and kind == "bias" and last != "mlp"
    placed = param_sharding(current_mesh(), f"moe/experts/{layer}/{kind}", shape, logical)
    return _Leaf(placed.spec, gathered, shared, once)


# ------------------------------------------------------------------------------- the fast path


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sparse(job: _Job, weights: Any, rows: Routed, seed: jax.Array) -> jax.Array:
    """`moe_ffn` by sorted blocks, on one device or on the mesh; rows are [B,T,…]."""
    return _run_forward(job, weights, rows, seed, keep=False)[0]


def _run_forward(job: _Job, weights: Any, rows: Routed, seed: jax.Array, keep: bool):
    """(y, what is kept for the backward pass or None)."""
    out_specs = PartitionSpec(job.batch or None), job.kept
    body = _mapped(job, partial(_forward_here, job, keep), weights, out_specs)
    return body(weights, rows, seed)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Trained:
    """One flag per array of the weights. Left to the compiler, the gradients of frozen ones would
    be computed where rounds of an exchange carry them."""

    flags: tuple[bool, ...]


def _sparse_fwd(job, weights, rows, seed):
    trained = _Trained(tuple(leaf.perturbed for leaf in jax.tree.leaves(weights)))
    weights, rows, seed = jax.tree.map(lambda a: a.value, (weights, rows, seed))
    y, first = _run_forward(job, weights, rows, seed, job.keep)
    return y, (trained, weights, rows, seed, first)


def _sparse_bwd(job, kept, g_BTD):
    trained, weights, rows, seed, first = kept
    flags, batch = trained.flags, PartitionSpec(job.batch or None)
    out = [leaf.spec for leaf, flag in zip(job.leaves, flags, strict=False) if flag]
    out_specs, more_specs = (out, batch, batch), (batch, job.kept)
    body = _mapped(job, partial(_backward_here, job, flags), weights, out_specs, *more_specs)
    dtrained, dx, dweight = body(weights, rows, seed, g_BTD, first)
    found = iter(dtrained)
    dweights = [next(found) if flag else None for flag in flags]
    dweights = jax.tree.structure(weights).unflatten(dweights)
    return dweights, Routed(dx, None, dweight, None), None


_sparse.defvjp(_sparse_fwd, _sparse_bwd, symbolic_zeros=True)


def _mapped(job: _Job, body, weights: Any, out_specs, *more_specs):
    """`body(weights, rows, seed, …)` under shard_map, or itself on one device."""
    if job.mesh is None:
        return body
    specs = jax.tree.structure(weights).unflatten([leaf.spec for leaf in job.leaves])
    in_specs = (specs, PartitionSpec(job.batch or None), PartitionSpec(), *more_specs)
    return jax.shard_map(
        body, mesh=job.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _flat(a: jax.Array) -> jax.Array:
    return a.reshape(-1, *a.shape[2:])


def _forward_here(job: _Job, keep: bool, weights: Any, rows: Routed, seed: jax.Array):
    lead = rows.row_X.shape
    seed_E = _seeds(job, weights, seed)
    weights, rows = _whole(job, weights), _held(job, weights, jax.tree.map(_flat, rows))

    def apply(rows: Routed) -> tuple[jax.Array, Any]:
        return grouped.forward(job.expert_fn, weights, rows, seed_E, job.blocks, keep)

    if job.group is None:
        y, first = apply(rows)
    else:
        width = job.expert_fn.features or rows.x_XD.shape[1]
        y = exchange.forward(job.form, job.group, lambda rows: apply(rows)[0], rows, width)
        first = None
    y = jax.lax.psum(y, job.summed) if job.summed else y
    return y.reshape(*lead, -1), first


def _backward_here(job: _Job, trained, weights: Any, rows: Routed, seed: jax.Array, g_BTD, first):
    """(gradients of the trained arrays of the weights, in order; of x; of the combine weights)."""
    lead, top_k = rows.row_X.shape, rows.expert_XK.shape[-1]
    seed_E = _seeds(job, weights, seed)
    whole, rows = _whole(job, weights), _held(job, weights, jax.tree.map(_flat, rows))

    def pull(rows: Routed, g_XD: jax.Array, dtrained: list[jax.Array]):
        return grouped.backward(
            job.expert_fn, whole, trained, rows, seed_E, job.blocks, g_XD, dtrained, first
        )

    wanted = grouped.selected(jax.tree.leaves(whole), trained)
    zeros = [jnp.zeros(w.shape, jnp.float32) for w in wanted]
    g_XD = _flat(g_BTD)
    if job.group is None:
        dtrained, dx, dweight = pull(rows, g_XD, zeros)
    else:
        dtrained, dx, dweight = exchange.backward(job.form, job.group, pull, rows, g_XD, zeros)
    if job.summed:
        dx, dweight = jax.lax.psum((dx, dweight), job.summed)
    dtrained = _summed(job, trained, dtrained, weights)
    return dtrained, dx.reshape(*lead, -1), dweight.reshape(*lead, top_k)


def _seeds(job: _Job, weights: Any, seed: jax.Array) -> jax.Array:
    """Of the experts here, by their numbers in the whole layer."""
    axes = job.group.axes if job.group else job.held
    experts = jax.tree.leaves(weights)[0].shape[0]
    first = jax.lax.axis_index(axes) * experts if axes else 0
    return expert_seeds(seed, first + jnp.arange(experts))


def _held(job: _Job, weights: Any, rows: Routed) -> Routed:
    """Rows with experts as numbered here, where tokens lie with all experts' devices."""
    if not job.held:
        return rows
    experts = jax.tree.leaves(weights)[0].shape[0]
    here = jax.lax.axis_index(job.held)
    return rows._replace(expert_XK=exchange.on_shard(rows.expert_XK, here, experts))


def _whole(job: _Job, weights: Any) -> Any:
    """This device's experts in the expert's dtype, put together from their shards."""
    leaves, treedef = jax.tree.flatten(weights)
    leaves = [w.astype(job.expert_fn.dtype) for w in leaves]
    for number, leaf in enumerate(job.leaves):
        for dim, axes in leaf.gathered:
            leaves[number] = jax.lax.all_gather(leaves[number], axes, axis=dim, tiled=True)
        leaves[number] = _once(job, leaf, leaves[number])
    return jax.tree.unflatten(treedef, leaves)


def _summed(job: _Job, trained, dtrained: list[jax.Array], weights: Any) -> list[jax.Array]:
    """The transpose of `_whole`: gradients summed over devices, cut as the weights are."""
    like = grouped.selected(jax.tree.leaves(weights), trained)
    leaves = grouped.selected(job.leaves, trained) if job.mesh is not None else []
    for number, leaf in enumerate(leaves):
        dw = _once(job, leaf, dtrained[number])
        dw = jax.lax.psum(dw, leaf.shared) if leaf.shared else dw
        for dim, axes in leaf.gathered:
            dw = _scattered(job, dw, dim, axes)
        dtrained[number] = dw
    return [dw.astype(w.dtype) for dw, w in zip(dtrained, like, strict=True)]


def _scattered(job: _Job, dw: jax.Array, dim: int, axes: tuple[str, ...]) -> jax.Array:
    """This device's part of dimension `dim`, summed over axes whose devices saw other tokens."""
    for axis in axes:
        if axis in job.batch:
            dw = jax.lax.psum_scatter(dw, axis, scatter_dimension=dim, tiled=True)
        else:
            size = dw.shape[dim] // job.mesh.shape[axis]
            dw = jax.lax.dynamic_slice_in_dim(dw, jax.lax.axis_index(axis) * size, size, dim)
    return dw


def _once(job: _Job, leaf: _Leaf, w: jax.Array) -> jax.Array:
    if not leaf.once:
        return w
    return jnp.where(jax.lax.axis_index(job.hidden) == 0, w, 0)
