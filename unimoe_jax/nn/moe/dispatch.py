"""Tokens to experts and back: one function, with a dense reference and a sorted, sharded fast path.

Both have the same signature and must agree in values and gradients. An expert number of E means "no
expert". Such slots add nothing, and in the grouped path they cost nothing.

The grouped path is one custom gradient around all of these steps. The experts' weights are gathered
along the dimensions that fsdp cuts; experts stay cut, and so does the hidden width if a mesh axis
cuts it. Tokens go to the devices of their experts (exchange.py), the experts are applied there
(grouped.py), and the results come back. In the backward pass gradients of weights are summed
straight into the shards that hold these weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from unimoe_jax.nn.moe import exchange, grouped
from unimoe_jax.nn.moe.exchange_rounds import on_shard
from unimoe_jax.nn.moe.experts import ExpertFunction, expert_seeds
from unimoe_jax.nn.moe.grouped import Routed
from unimoe_jax.nn.moe.mesh_layout import CallLayout, ExchangeSetting, WeightLayout, call_layout


def moe_ffn(
    expert_fn: ExpertFunction,
    weights: Any,
    x_BTD: jax.Array,
    expert_BTK: jax.Array,
    weight_BTK: jax.Array,
    seed: jax.Array,
    method: Literal["grouped", "dense"] = "grouped",
    form: ExchangeSetting = "auto",
    keep_hidden: bool = False,
) -> jax.Array:
    """Return y[b,t] = Σ_k weight[b,t,k] · expert_fn(weights[expert[b,t,k]], x[b,t]), [B,T,D].

    D is the width of x, or `expert_fn.features` if that is set (experts of a connector). No slot is
    dropped; see `limit_load` for that. The function is differentiable in weights (with float32
    sums), x and weight.

    Args:
        expert_fn: the function of an expert on rows.
        weights: pytree {layer: {leaf: array}} with a leading experts axis E; it is cast to the
            expert's dtype here.
        x_BTD: tokens.
        expert_BTK: int32 in [0, E].
        weight_BTK: float32.
        seed: uint32 scalar for adapter dropout.
        method: "grouped", or "dense" (every expert on every token, left to the compiler).
        form: how tokens reach the experts of other devices; "auto" chooses by the bytes moved.
        keep_hidden: whether the results of the experts' first layers are kept for the backward
            pass, instead of being computed again. This saves a fifth of the products of a training
            step, and takes T · K rows of the hidden width, twice that for SwiGLU. It has an effect
            in the grouped path, and only where no tokens are exchanged.

    Raises:
        ShardingError: the mesh cuts experts over some axes that cut the batch and over some that do
            not, or it does not divide the weights.
    """
    tokens = x_BTD.shape[0] * x_BTD.shape[1]
    row_BT = jnp.arange(tokens, dtype=jnp.uint32).reshape(x_BTD.shape[:2])
    rows = jax.tree.map(jnp.asarray, Routed(x_BTD, expert_BTK, weight_BTK, row_BT))
    if method == "dense":
        flat = jax.tree.map(lambda a: a.reshape(tokens, *a.shape[2:]), rows)
        return _dense(expert_fn, weights, flat, seed).reshape(*x_BTD.shape[:2], -1)
    layout = call_layout(expert_fn, weights, rows, form, keep_hidden)
    return _sparse(layout, weights, rows, seed)


def _dense(expert_fn: ExpertFunction, weights: Any, rows: Routed, seed: jax.Array) -> jax.Array:
    """Apply every expert to every token, with weight 0 where it was not chosen: the reference."""
    x_XD, expert_XK, weight_XK, row_X = rows
    experts = jax.tree.leaves(weights)[0].shape[0]
    weights = jax.tree.map(lambda w: w.astype(expert_fn.dtype), weights)
    combine_EX = jnp.sum(
        jnp.where(expert_XK[None] == jnp.arange(experts)[:, None, None], weight_XK[None], 0.0),
        axis=-1,
    )

    def add_expert(y_XD, expert):
        w, combine_X, expert_seed = expert
        out = expert_fn(w, x_XD, row_X, expert_seed).astype(jnp.float32)
        return y_XD + combine_X[:, None] * out, None

    empty = jnp.zeros((x_XD.shape[0], expert_fn.features or x_XD.shape[1]), jnp.float32)
    seed_E = expert_seeds(seed, jnp.arange(experts))
    y, _ = jax.lax.scan(add_expert, empty, (weights, combine_EX, seed_E))
    return y.astype(x_XD.dtype)


def limit_load(
    expert_BTK: jax.Array, weight_BTK: jax.Array, experts: int, capacity_factor: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Drop the slots above ⌈factor · T · K / E⌉ per expert and row of the batch.

    This is section 2.2 of arXiv 2006.16668 with the rows of the batch as groups. First choices take
    the places before second ones, and earlier tokens before later ones. Rows are never cut over
    devices, so the result is the same on any mesh.

    Example: a factor of 1.1 with T = 50, K = 2 and E = 10 gives every expert 11 slots per row. If
    all 50 first choices are expert 0, tokens 0 to 10 keep it, and 39 slots are dropped.

    Returns:
        expert_BTK with E at dropped slots, weight_BTK with 0 there, and the number of dropped slots
        (float32 scalar).
    """
    _, length, top_k = expert_BTK.shape
    # Use the decimal value: in floating point 1.1 · 100 > 110, and the ceiling would add a slot.
    capacity = -(-Fraction(str(capacity_factor)) * length * top_k // experts)
    by_choice = jnp.moveaxis(expert_BTK, 2, 1)  # [B,K,T]: all first choices come first
    chosen = jax.nn.one_hot(by_choice, experts, dtype=jnp.int32).reshape(
        -1, top_k * length, experts
    )
    # place: 1 for the first slot of an expert in a row, 2 for the second, and so on.
    place = jnp.sum(jnp.cumsum(chosen, axis=1) * chosen, axis=-1).reshape(by_choice.shape)
    over = jnp.moveaxis(place > capacity, 1, 2)
    dropped = jnp.sum(over, dtype=jnp.float32)
    return jnp.where(over, experts, expert_BTK), jnp.where(over, 0.0, weight_BTK), dropped


# -------------------------------------------------------------------------- the custom gradient


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sparse(layout: CallLayout, weights: Any, rows: Routed, seed: jax.Array) -> jax.Array:
    """Compute `moe_ffn` in sorted blocks, on one device or on the mesh; rows are [B,T,…].

    Example: expert 0 multiplies by 1 and expert 1 by 2. A token x = 3 chooses both, with the
    weights (0.5, 0.25), so y = 0.5 · 3 + 0.25 · 6 = 3. For a gradient of 1 the backward pass
    computes the experts' results (3, 6) again, or takes what was kept of them. The gradient of the
    weights is (3, 6), that of the kernels is weight · x = (1.5, 0.75), and dx = 0.5 + 0.25 · 2 = 1.
    """
    return _run_forward(layout, weights, rows, seed, keep=False)[0]


def _run_forward(layout: CallLayout, weights: Any, rows: Routed, seed: jax.Array, keep: bool):
    """Return y, and what is kept for the backward pass (None without `keep`)."""
    out_specs = PartitionSpec(layout.batch or None), layout.kept_spec
    body = _on_mesh(layout, partial(_forward_here, layout, keep), weights, out_specs)
    return body(weights, rows, seed)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Trained:
    """One flag per array of the weights: whether its gradient is wanted.

    The compiler cannot remove the gradients of frozen arrays where the rounds of an exchange carry
    them from one to the next, so they are not computed in the first place.
    """

    flags: tuple[bool, ...]


def _sparse_fwd(layout, weights, rows, seed):
    trained = _Trained(tuple(leaf.perturbed for leaf in jax.tree.leaves(weights)))
    weights, rows, seed = jax.tree.map(lambda a: a.value, (weights, rows, seed))
    y, kept = _run_forward(layout, weights, rows, seed, layout.keep_hidden)
    return y, (trained, weights, rows, seed, kept)


def _sparse_bwd(layout: CallLayout, residuals, g_BTD):
    trained, weights, rows, seed, kept = residuals
    flags, batch = trained.flags, PartitionSpec(layout.batch or None)
    # On one device there are no layouts of weights, and the specs are not used.
    trained_specs = [w.spec for w, flag in zip(layout.weights, flags, strict=False) if flag]
    body = _on_mesh(
        layout,
        partial(_backward_here, layout, flags),
        weights,
        out_specs=(trained_specs, batch, batch),
        more_in_specs=(batch, layout.kept_spec),
    )
    dtrained, dx, dweight = body(weights, rows, seed, g_BTD, kept)
    # Put the gradients of the trained arrays to their places. None stands for a gradient of zero.
    remaining = iter(dtrained)
    dweights = [next(remaining) if flag else None for flag in flags]
    dweights = jax.tree.structure(weights).unflatten(dweights)
    no_gradient: Any = None
    return dweights, Routed(dx, no_gradient, dweight, no_gradient), None


_sparse.defvjp(_sparse_fwd, _sparse_bwd, symbolic_zeros=True)


def _on_mesh(layout: CallLayout, body, weights: Any, out_specs, more_in_specs: tuple = ()):
    """Return `body(weights, rows, seed, …)` under `shard_map`, or itself on one device.

    Example: a mesh with fsdp = 2 and expert = 2, x [4,T,64], and kernels [8,64,128]. Every device
    runs `body` on x [1,T,64] and on kernels [4,32,128]. `_gather_weights` makes them [4,64,128].
    """
    if layout.mesh is None:
        return body
    weight_specs = jax.tree.structure(weights).unflatten([w.spec for w in layout.weights])
    in_specs = (weight_specs, PartitionSpec(layout.batch or None), PartitionSpec(), *more_in_specs)
    return jax.shard_map(
        body, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


# ------------------------------------------------------------------------------ on one device


def _flat(a: jax.Array) -> jax.Array:
    """Return a [B,T,…] as [X,…]."""
    return a.reshape(-1, *a.shape[2:])


def _forward_here(layout: CallLayout, keep: bool, weights: Any, rows: Routed, seed: jax.Array):
    """Return (y [B,T,features], what is kept) for the tokens of this device."""
    batch_shape = rows.row_X.shape
    seed_E = _seeds_here(layout, weights, seed)
    weights = _gather_weights(layout, weights)
    rows = _number_here(layout, weights, jax.tree.map(_flat, rows))

    def apply(rows: Routed) -> tuple[jax.Array, Any]:
        return grouped.forward(layout.expert_fn, weights, rows, seed_E, layout.blocks, keep)

    if layout.group is None:
        y, kept = apply(rows)
    else:
        width = layout.expert_fn.features or rows.x_XD.shape[1]
        y = exchange.forward(layout.form, layout.group, lambda rows: apply(rows)[0], rows, width)
        kept = None
    # Add the results of devices that hold other experts, or other parts of the hidden width.
    y = jax.lax.psum(y, layout.summed_axes) if layout.summed_axes else y
    return y.reshape(*batch_shape, -1), kept


def _backward_here(
    layout: CallLayout, trained, weights: Any, rows: Routed, seed: jax.Array, g_BTD, kept
):
    """Return the gradients of the trained weights (in order), of x, and of the combine weights."""
    batch_shape, top_k = rows.row_X.shape, rows.expert_XK.shape[-1]
    seed_E = _seeds_here(layout, weights, seed)
    gathered = _gather_weights(layout, weights)
    rows = _number_here(layout, weights, jax.tree.map(_flat, rows))

    def pull(rows: Routed, g_XD: jax.Array, dtrained: list[jax.Array]):
        return grouped.backward(
            layout.expert_fn, gathered, trained, rows, seed_E, layout.blocks, g_XD, dtrained, kept
        )

    # Sum the gradients of the gathered weights in float32, over all blocks and rounds.
    trained_weights = grouped.selected(jax.tree.leaves(gathered), trained)
    zeros = [jnp.zeros(w.shape, jnp.float32) for w in trained_weights]
    g_XD = _flat(g_BTD)
    if layout.group is None:
        dtrained, dx, dweight = pull(rows, g_XD, zeros)
    else:
        dtrained, dx, dweight = exchange.backward(
            layout.form, layout.group, pull, rows, g_XD, zeros
        )
    # Add the gradients of the devices that computed other parts of the same results.
    if layout.summed_axes:
        dx, dweight = jax.lax.psum((dx, dweight), layout.summed_axes)
    dtrained = _scatter_gradients(layout, trained, dtrained, weights)
    return dtrained, dx.reshape(*batch_shape, -1), dweight.reshape(*batch_shape, top_k)


def _seeds_here(layout: CallLayout, weights: Any, seed: jax.Array) -> jax.Array:
    """Return the seeds of this device's experts, by their numbers in the whole layer."""
    axes = layout.group.axes if layout.group else layout.expert_only
    experts = jax.tree.leaves(weights)[0].shape[0]
    first = jax.lax.axis_index(axes) * experts if axes else 0
    return expert_seeds(seed, first + jnp.arange(experts))


def _number_here(layout: CallLayout, weights: Any, rows: Routed) -> Routed:
    """Return rows with experts as numbered on this device, if its tokens need no exchange.

    If tokens are exchanged, exchange.py does this when they arrive.
    """
    if not layout.expert_only:
        return rows
    experts = jax.tree.leaves(weights)[0].shape[0]
    here = jax.lax.axis_index(layout.expert_only)
    return rows._replace(expert_XK=on_shard(rows.expert_XK, here, experts))


def _gather_weights(layout: CallLayout, weights: Any) -> Any:
    """Return this device's experts in the expert's dtype, gathered from their shards."""
    leaves, treedef = jax.tree.flatten(weights)
    leaves = [w.astype(layout.expert_fn.dtype) for w in leaves]
    for number, weight in enumerate(layout.weights):
        for dim, axes in weight.gathered:
            leaves[number] = jax.lax.all_gather(leaves[number], axes, axis=dim, tiled=True)
        leaves[number] = _zero_unless_first(layout, weight, leaves[number])
    return jax.tree.unflatten(treedef, leaves)


def _scatter_gradients(
    layout: CallLayout, trained, dtrained: list[jax.Array], weights: Any
) -> list[jax.Array]:
    """Return gradients summed over devices and cut as the weights are cut.

    This is the transpose of `_gather_weights`.
    """
    trained_weights = grouped.selected(jax.tree.leaves(weights), trained)
    layouts = grouped.selected(layout.weights, trained) if layout.mesh is not None else []
    for number, weight in enumerate(layouts):
        dw = _zero_unless_first(layout, weight, dtrained[number])
        dw = jax.lax.psum(dw, weight.shared) if weight.shared else dw
        for dim, axes in weight.gathered:
            dw = _scatter(layout, dw, dim, axes)
        dtrained[number] = dw
    return [dw.astype(w.dtype) for dw, w in zip(dtrained, trained_weights, strict=True)]


def _scatter(layout: CallLayout, dw: jax.Array, dim: int, axes: tuple[str, ...]) -> jax.Array:
    """Return this device's part of dimension `dim`, summed over devices that saw other tokens."""
    assert layout.mesh is not None  # on one device nothing is gathered, so nothing is scattered
    for axis in axes:
        if axis in layout.batch:
            dw = jax.lax.psum_scatter(dw, axis, scatter_dimension=dim, tiled=True)
        else:
            # The devices of this axis saw the same tokens, so their gradients are equal.
            size = dw.shape[dim] // layout.mesh.shape[axis]
            dw = jax.lax.dynamic_slice_in_dim(dw, jax.lax.axis_index(axis) * size, size, dim)
    return dw


def _zero_unless_first(layout: CallLayout, weight: WeightLayout, w: jax.Array) -> jax.Array:
    """Return w, or zeros if only the first device of `layout.hidden` may add it."""
    if not weight.add_once:
        return w
    return jnp.where(jax.lax.axis_index(layout.hidden) == 0, w, 0)
