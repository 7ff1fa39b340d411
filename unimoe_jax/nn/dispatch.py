"""Tokens to experts and back: a dense reference and a sorted, dropless fast path.

Both share one signature and must agree in values and gradients. `expert_XK == E` means "no expert":
such slots add nothing and cost nothing in the grouped path.

The grouped path sorts slots by expert and walks each expert's rows in large blocks with a tail of
smaller ones, so that the rows multiplied are the rows routed (at most 31 more per expert). One
custom gradient around the whole feed-forward recomputes each block in the backward pass; neither
the permuted tokens nor the experts' outputs are kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from unimoe_jax.nn.experts import ExpertFunction
from unimoe_jax.sharding import EXPERT_AXIS, batch_mesh_axes, current_mesh

LARGEST_BLOCK, SMALLEST_BLOCK = 512, 32


def moe_ffn(
    expert_fn: ExpertFunction,
    weights: Any,
    x_BTD: jax.Array,
    expert_BTK: jax.Array,
    weight_BTK: jax.Array,
    seed: jax.Array,
    method: str = "grouped",
) -> jax.Array:
    """y[b,t] = Σ_k weight[b,t,k] · expert_fn(weights[expert[b,t,k]], x[b,t]), shape [B,T,D].

    Args:
        weights: pytree of arrays with a leading experts axis E.
        expert_BTK: int32 in [0, E].
        weight_BTK: float32.
        seed: uint32 scalar for adapter dropout.
        method: "grouped" or "dense".

    On a mesh the batch stays where it is. Experts lie on the expert axis: each shard sees all
    tokens of its expert group (all-gather), computes its own experts, and the partial sums are
    scattered back.
    """
    weights = jax.tree.map(lambda w: w.astype(expert_fn.dtype), weights)
    local = partial(_dense if method == "dense" else grouped, expert_fn)
    row_BT = jnp.arange(x_BTD.shape[0] * x_BTD.shape[1], dtype=jnp.uint32).reshape(x_BTD.shape[:2])
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return _flat(local, weights, x_BTD, expert_BTK, weight_BTK, row_BT, seed)
    batch = PartitionSpec(batch_mesh_axes())
    shards = mesh.shape[EXPERT_AXIS]
    # Only the experts axis of the weights is cut inside; what fsdp or tensor cut is gathered here.
    body = partial(_local_experts, local, shards) if shards > 1 else partial(_flat, local)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(EXPERT_AXIS), batch, batch, batch, batch, PartitionSpec()),
        out_specs=batch,
        check_vma=False,
    )(weights, x_BTD, expert_BTK, weight_BTK, row_BT, seed)


def _flat(local, weights, x_BTD, expert_BTK, weight_BTK, row_BT, seed) -> jax.Array:
    width, k = x_BTD.shape[-1], expert_BTK.shape[-1]
    y = local(
        weights,
        x_BTD.reshape(-1, width),
        expert_BTK.reshape(-1, k),
        weight_BTK.reshape(-1, k),
        row_BT.reshape(-1),
        seed,
    )
    return y.reshape(x_BTD.shape)


def _local_experts(local, shards, weights, x_BTD, expert_BTK, weight_BTK, row_BT, seed):
    """All-gather tokens over the expert axis, apply this shard's experts, reduce-scatter."""
    gather = partial(jax.lax.all_gather, axis_name=EXPERT_AXIS, axis=0, tiled=True)
    x, expert, weight, row = (gather(a) for a in (x_BTD, expert_BTK, weight_BTK, row_BT))
    here = jax.tree.leaves(weights)[0].shape[0]
    mine = expert - jax.lax.axis_index(EXPERT_AXIS) * here
    expert = jnp.where((mine >= 0) & (mine < here), mine, here)
    y = _flat(local, weights, x, expert, weight, row, seed)
    # Partial sums meet in float32: with bf16 the order of shards would show in the result.
    y = y.astype(jnp.float32)
    y = jax.lax.psum_scatter(y, EXPERT_AXIS, scatter_dimension=0, tiled=True)
    return y.astype(x_BTD.dtype)


def _dense(expert_fn, weights, x_XD, expert_XK, weight_XK, row_X, seed) -> jax.Array:
    """Every expert on every token, weighted by 0 where it was not chosen: the specification."""
    experts = jax.tree.leaves(weights)[0].shape[0]
    combine_EX = jnp.sum(
        jnp.where(expert_XK[None] == jnp.arange(experts)[:, None, None], weight_XK[None], 0.0),
        axis=-1,
    )

    def add(y_XD, expert):
        w, combine_X = expert
        out = expert_fn(w, x_XD, row_X, seed).astype(jnp.float32)
        return y_XD + combine_X[:, None] * out, None

    y, _ = jax.lax.scan(add, jnp.zeros(x_XD.shape, jnp.float32), (weights, combine_EX))
    return y.astype(x_XD.dtype)


class _Order(NamedTuple):
    """Slots (token-major, S = X·K) sorted by expert.

    slot_of: [S + LARGEST_BLOCK] slot at each sorted position; the tail is padding.
    position_of: [S] sorted position of each slot.
    start, count: [E] rows of each expert.
    """

    slot_of: jax.Array
    position_of: jax.Array
    start: jax.Array
    count: jax.Array


def _sort_slots(expert_XK: jax.Array, experts: int) -> _Order:
    """Counting sort: cheaper than argsort, and it gives the ranks as well."""
    slot_expert = expert_XK.reshape(-1)
    chosen = slot_expert[:, None] == jnp.arange(experts + 1)[None]
    rank = jnp.cumsum(chosen.astype(jnp.int32), axis=0)
    count = rank[-1]
    start = jnp.cumsum(count) - count
    rank_of = jnp.take_along_axis(rank, slot_expert[:, None], axis=1)[:, 0] - 1
    position_of = start[slot_expert] + rank_of
    slots = jnp.arange(slot_expert.shape[0], dtype=jnp.int32)
    slot_of = jnp.zeros(slots.shape[0] + LARGEST_BLOCK, jnp.int32).at[position_of].set(slots)
    return _Order(slot_of, position_of, start[:experts], count[:experts])


def _block_sizes(slots: int, experts: int) -> tuple[int, ...]:
    """Largest block near the mean load, then quarters of it down to the smallest."""
    mean = max(1, slots // experts)
    size = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << int(np.floor(np.log2(mean)))))
    sizes = [size]
    while sizes[-1] > SMALLEST_BLOCK:
        sizes.append(max(SMALLEST_BLOCK, sizes[-1] // 4))
    return tuple(sizes)


def _over_blocks(sizes: tuple[int, ...], start, count, body, carry):
    """Fold `body(carry, offset, size)` over blocks that cover `count` rows from `start`.

    Offsets depend on the loop index, otherwise XLA hoists a body of at most one trip and always
    runs it.
    """
    done = jnp.zeros_like(count)
    for number, size in enumerate(sizes):
        last = number == len(sizes) - 1
        trips = -((done - count) // size) if last else (count - done) // size
        base = start + done

        def step(i, carry, size=size, base=base):
            return body(carry, base + i * size, size)

        carry = jax.lax.fori_loop(0, trips, step, carry)
        done = done + trips * size
    return carry


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped(
    expert_fn: ExpertFunction,
    weights: Any,
    x_XD: jax.Array,
    expert_XK: jax.Array,
    weight_XK: jax.Array,
    row_X: jax.Array,
    seed: jax.Array,
) -> jax.Array:
    """The sorted, dropless feed-forward on one device; see `moe_ffn` for the meaning."""
    experts, k = jax.tree.leaves(weights)[0].shape[0], expert_XK.shape[1]
    order = _sort_slots(expert_XK, experts)
    sizes = _block_sizes(expert_XK.size, experts)

    def one_expert(y_sorted, expert):
        w, start, count = expert

        def block(y_sorted, offset, size):
            token = jax.lax.dynamic_slice(order.slot_of, (offset,), (size,)) // k
            y = expert_fn(w, x_XD[token], row_X[token], seed)
            # A tail block may write into the next expert's rows; that expert overwrites them.
            return jax.lax.dynamic_update_slice_in_dim(y_sorted, y, offset, axis=0)

        return _over_blocks(sizes, start, count, block, y_sorted), None

    y_sorted = jnp.zeros((order.slot_of.shape[0], x_XD.shape[1]), x_XD.dtype)
    y_sorted, _ = jax.lax.scan(one_expert, y_sorted, (weights, order.start, order.count))
    y_XKD = y_sorted[order.position_of].reshape(*expert_XK.shape, -1).astype(jnp.float32)
    # Rows of "no expert" slots were never computed and may hold a tail block's leftovers.
    y_XKD = jnp.where((expert_XK < experts)[..., None], y_XKD, 0.0)
    return jnp.sum(y_XKD * weight_XK[..., None], axis=1).astype(x_XD.dtype)


def _grouped_fwd(expert_fn, *args):
    return grouped(expert_fn, *args), args


def _grouped_bwd(expert_fn, args, g_XD):
    weights, x_XD, expert_XK, weight_XK, row_X, seed = args
    experts, k = jax.tree.leaves(weights)[0].shape[0], expert_XK.shape[1]
    order = _sort_slots(expert_XK, experts)
    sizes = _block_sizes(expert_XK.size, experts)
    slot_weight = weight_XK.reshape(-1)

    def one_expert(carry, expert):
        w, start, count = expert

        def block(carry, offset, size):
            dx_sorted, dweight_sorted, dw = carry
            slot = jax.lax.dynamic_slice(order.slot_of, (offset,), (size,))
            token = slot // k
            mine = (offset + jnp.arange(size) < start + count)[:, None]
            g = jnp.where(mine, g_XD[token], 0).astype(jnp.float32)
            y, pull = jax.vjp(lambda w, x: expert_fn(w, x, row_X[token], seed), w, x_XD[token])
            dweight = jnp.sum(g * y.astype(jnp.float32), axis=1)
            dw_block, dx = pull((g * slot_weight[slot][:, None]).astype(y.dtype))
            dw = jax.tree.map(lambda a, b: a + b.astype(a.dtype), dw, dw_block)
            dx_sorted = jax.lax.dynamic_update_slice_in_dim(dx_sorted, dx, offset, axis=0)
            dweight_sorted = jax.lax.dynamic_update_slice(dweight_sorted, dweight, (offset,))
            return dx_sorted, dweight_sorted, dw

        dw = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), w)
        dx_sorted, dweight_sorted, dw = _over_blocks(sizes, start, count, block, (*carry, dw))
        return (dx_sorted, dweight_sorted), jax.tree.map(lambda a, b: a.astype(b.dtype), dw, w)

    rows = order.slot_of.shape[0]
    empty = (jnp.zeros((rows, x_XD.shape[1]), x_XD.dtype), jnp.zeros(rows, jnp.float32))
    (dx_sorted, dweight_sorted), dw = jax.lax.scan(
        one_expert, empty, (weights, order.start, order.count)
    )
    real = expert_XK < experts
    dx_XKD = dx_sorted[order.position_of].reshape(*expert_XK.shape, -1)
    dx = jnp.sum(jnp.where(real[..., None], dx_XKD.astype(jnp.float32), 0.0), axis=1)
    dweight = jnp.where(real, dweight_sorted[order.position_of].reshape(expert_XK.shape), 0.0)
    return dw, dx.astype(x_XD.dtype), None, dweight, None, None


grouped.defvjp(_grouped_fwd, _grouped_bwd)
