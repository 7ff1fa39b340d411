"""Experts applied to the rows routed to them, on one device: sorted, dropless, in blocks.

Slots (a token's choice of an expert) are sorted by expert, and each expert's rows are walked in
large blocks with a tail of smaller ones, so that the rows multiplied are the rows routed but for a
few. Forward and backward are plain functions; dispatch.py joins them in one custom gradient.
Neither the permuted tokens nor the experts' outputs are kept; what the first layers computed is
kept on demand, else every block is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unimoe_jax.nn.moe.experts import ExpertFunction

# Blocks by platform. A CPU's fit its caches, and 64 rows take it as long as twice 32; elsewhere a
# block pays for reading the expert's weights and the sum of their gradients from memory.
BLOCKS = {"cpu": (512, 256, 128, 32)}
ACCELERATOR_BLOCKS = (2048, 1024, 512, 256, 128)
IN_PLACE = ("tpu",)
"""Platforms whose blocks read weights in place, see `Blocks`."""


class Routed(NamedTuple):
    """What experts work on.

    x_XD: tokens. expert_XK: int32 in [0, E]; E is "no expert" and costs nothing.
    weight_XK: float32. row_X: uint32, the number of each token in the whole batch.
    """

    x_XD: jax.Array
    expert_XK: jax.Array
    weight_XK: jax.Array
    row_X: jax.Array


class Blocks(NamedTuple):
    """How the rows of experts are walked: sizes of blocks, the largest first.

    in_place: a block reads its expert where the weights of all lie. A TPU multiplies a part of an
    array as it lies, and putting an expert aside takes it as long as hundreds of rows; elsewhere
    every block would put it aside again.
    """

    sizes: tuple[int, ...]
    in_place: bool


class _Order(NamedTuple):
    """Slots (token-major, S = X·K) sorted by expert.

    expert_of: [S] expert of each slot, E for none.
    slot_of: [S + largest block] slot at each sorted position; the tail is padding.
    position_of: [S] sorted position of each slot.
    start, count: [E] rows of each expert.
    """

    expert_of: jax.Array
    slot_of: jax.Array
    position_of: jax.Array
    start: jax.Array
    count: jax.Array


def _sort_slots(expert_XK: jax.Array, experts: int, padding: int) -> _Order:
    """Counting sort: cheaper than argsort, and it gives the ranks as well."""
    slot_expert = expert_XK.reshape(-1)
    chosen = slot_expert[:, None] == jnp.arange(experts + 1)[None]
    rank = jnp.cumsum(chosen.astype(jnp.int32), axis=0)
    count = rank[-1]
    start = jnp.cumsum(count) - count
    rank_of = jnp.take_along_axis(rank, slot_expert[:, None], axis=1)[:, 0] - 1
    position_of = start[slot_expert] + rank_of
    slots = jnp.arange(slot_expert.shape[0], dtype=jnp.int32)
    slot_of = jnp.zeros(slots.shape[0] + padding, jnp.int32).at[position_of].set(slots)
    return _Order(slot_expert, slot_of, position_of, start[:experts], count[:experts])


def blocks_for(mean_load: int, platform: str) -> Blocks:
    """The platform's blocks that are no larger than the mean load of an expert, or the smallest."""
    sizes = BLOCKS.get(platform, ACCELERATOR_BLOCKS)
    sizes = tuple(size for size in sizes if size <= mean_load) or sizes[-1:]
    return Blocks(sizes, in_place=platform in IN_PLACE)


def block_trips(left, size: int, smallest: int):
    """How many blocks of `size` rows are taken of those `left` (int, or an array of any kind).

    A block is taken whole if an eighth of it stays empty, for every block reads the expert's
    weights and adds to their gradient, which costs about as much as multiplying 35 rows; or if what
    stays empty is less than a smallest block: filled up with those, it would be as many rows.
    """
    return (left + max(size // 8, smallest - 1)) // size


def _over_blocks(sizes: tuple[int, ...], start, count, body, carry):
    """Fold `body(carry, offset, size)` over blocks that cover `count` rows from `start`.

    Offsets depend on the loop index, otherwise XLA hoists a body of at most one trip and always
    runs it.
    """
    done = jnp.zeros_like(count)
    for size in sizes:
        left = jnp.maximum(count - done, 0)
        trips = block_trips(left, size, sizes[-1])
        base = start + done

        def step(i, carry, size=size, base=base):
            return body(carry, base + i * size, size)

        carry = jax.lax.fori_loop(0, trips, step, carry)
        done = done + trips * size
    return carry


def _over_experts(
    blocks: Blocks, order: _Order, weights: Any, sums: list[jax.Array], block: Callable, carry: Any
) -> tuple[Any, list[jax.Array]]:
    """(carry, sums) after `block(carry, w, offset, size, end) -> (carry, more)` for every block of
    every expert: w is the expert's, its rows end at `end`, and `more` is added to its sums.

    weights and sums: arrays [E,…].
    """

    def read(offset):
        # Asked of the block's first row: an expert known before the loop is put aside there.
        number = order.expert_of[order.slot_of[offset]]
        part = partial(jax.lax.dynamic_index_in_dim, index=number, axis=0, keepdims=False)
        return jax.tree.map(part, weights)

    def one_expert(carry, expert):
        w, own, start, count = expert

        def step(state, offset, size):
            carry, own = state
            mine = read(offset) if blocks.in_place else w
            carry, more = block(carry, mine, offset, size, start + count)
            return carry, [a + b.astype(a.dtype) for a, b in zip(own, more, strict=True)]

        return _over_blocks(blocks.sizes, start, count, step, (carry, own))

    aside = None if blocks.in_place else weights
    return jax.lax.scan(one_expert, carry, (aside, sums, order.start, order.count))


def sum_choices(
    rows: jax.Array, at_XK: jax.Array, wanted_XK: jax.Array, weight_XK: jax.Array | None = None
) -> jax.Array:
    """[X,D] float32: Σ_k weight[x,k] · rows[at[x,k]] over the choices wanted; weight None is 1."""
    total = jnp.zeros((at_XK.shape[0], rows.shape[1]), jnp.float32)
    for k in range(at_XK.shape[1]):  # not at once: that would hold K rows of float32 per token
        wanted = wanted_XK[:, k]
        found = rows[jnp.where(wanted, at_XK[:, k], 0)].astype(jnp.float32)
        found = found if weight_XK is None else found * weight_XK[:, k, None]
        total += jnp.where(wanted[:, None], found, 0.0)
    return total


def forward(
    expert_fn: ExpertFunction,
    weights: Any,
    rows: Routed,
    seed_E: jax.Array,
    blocks: Blocks,
    keep: bool = False,
) -> tuple[jax.Array, Any]:
    """y[x] = Σ_k weight[x,k] · expert_fn(weights[expert[x,k]], x[x]), [X, features] like x, and
    what `backward` may be given, None without `keep`: `expert_fn.first` of every slot, sorted.

    weights: pytree with a leading axis of E experts. seed_E: uint32, of each expert's dropout.
    blocks: see `blocks_for`.
    """
    x_XD, expert_XK, weight_XK, row_X = rows
    experts, k = jax.tree.leaves(weights)[0].shape[0], expert_XK.shape[1]
    order = _sort_slots(expert_XK, experts, blocks.sizes[0])

    def compute(expert, x, row):
        w, seed = expert
        first = expert_fn.first(w, x, row, seed)
        return expert_fn.rest(w, first, row, seed), first if keep else None

    def block(out, expert, offset, size, end):
        del end
        token = jax.lax.dynamic_slice(order.slot_of, (offset,), (size,)) // k
        # A tail block may write into the next expert's rows; that expert overwrites them.
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=offset, axis=0)
        return jax.tree.map(write, out, compute(expert, x_XD[token], row_X[token])), []

    every = (weights, seed_E)
    one = jax.tree.map(lambda w: w[0], every)
    shapes = jax.eval_shape(compute, one, x_XD[:1], row_X[:1])
    positions = order.slot_of.shape[0]
    empty = jax.tree.map(lambda s: jnp.zeros((positions, *s.shape[1:]), s.dtype), shapes)
    (y_sorted, first), _ = _over_experts(blocks, order, every, [], block, empty)
    # Rows of "no expert" slots were never computed and may hold a tail block's leftovers.
    at_XK, real_XK = order.position_of.reshape(expert_XK.shape), expert_XK < experts
    return sum_choices(y_sorted, at_XK, real_XK, weight_XK).astype(x_XD.dtype), first


def selected(items: Sequence, flags: Sequence[bool]) -> list:
    """The items whose flag is set."""
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def _replaced(weights: Any, flags: Sequence[bool], some: Sequence) -> Any:
    """Weights with the arrays whose flag is set exchanged for `some`."""
    leaves, treedef = jax.tree.flatten(weights)
    new = iter(some)
    both = zip(leaves, flags, strict=True)
    return treedef.unflatten([next(new) if flag else leaf for leaf, flag in both])


def _of_block(
    expert_fn: ExpertFunction,
    w: Any,
    trained: Sequence[bool],
    work: tuple[jax.Array, jax.Array, jax.Array],
    seed: jax.Array,
    g: jax.Array,
    kept: Any,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Gradients of one expert's trained weights, of some rows and of their weights.

    work: rows, their weights and numbers. g: gradient of the result. kept: of `forward`, or None.
    """
    x, weight, row = work

    def read(some, x):
        return expert_fn.first(_replaced(w, trained, some), x, row, seed)

    def finish(some, first, scale):
        return expert_fn.rest(_replaced(w, trained, some), first, row, seed, scale)

    some = selected(jax.tree.leaves(w), trained)
    # The compiler drops the products of what is kept: nothing else asks for them.
    computed, pull_read = jax.vjp(read, some, x)
    _, pull_finish = jax.vjp(finish, some, computed if kept is None else kept, weight)
    last, dfirst, dweight = pull_finish(g)
    first, dx = pull_read(dfirst)
    return [a + b for a, b in zip(first, last, strict=True)], dx, dweight.astype(jnp.float32)


def backward(
    expert_fn: ExpertFunction,
    weights: Any,
    trained: Sequence[bool],
    rows: Routed,
    seed_E: jax.Array,
    blocks: Blocks,
    g_XD: jax.Array,
    dtrained: list[jax.Array],
    first: Any = None,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """(gradient of the trained weights added to `dtrained`, of x, and of weight_XK).

    trained: one flag per array of `weights`, in the order of `jax.tree.leaves`. dtrained: float32,
    shaped like the arrays flagged. g_XD is the gradient of what `forward` returns, `first` what it
    kept, None if nothing.
    """
    x_XD, expert_XK, weight_XK, row_X = rows
    experts, k = jax.tree.leaves(weights)[0].shape[0], expert_XK.shape[1]
    order = _sort_slots(expert_XK, experts, blocks.sizes[0])
    slot_weight = weight_XK.reshape(-1)

    def block(carry, expert, offset, size, end):
        (w, seed), (dx_sorted, dweight_sorted) = expert, carry
        slot = jax.lax.dynamic_slice(order.slot_of, (offset,), (size,))
        mine = offset + jnp.arange(size) < end
        # Another expert's rows have a gradient of zero, but in float16 could overflow in this one.
        slot = jnp.where(mine, slot, order.slot_of[end - 1])
        token = slot // k
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=offset, slice_size=size, axis=0)
        g = jnp.where(mine[:, None], g_XD[token], 0).astype(expert_fn.dtype)
        work = (x_XD[token], slot_weight[slot], row_X[token])
        kept = None if first is None else jax.tree.map(cut, first)
        dw, dx, dweight = _of_block(expert_fn, w, trained, work, seed, g, kept)
        dx_sorted = jax.lax.dynamic_update_slice_in_dim(dx_sorted, dx, offset, axis=0)
        dweight_sorted = jax.lax.dynamic_update_slice(dweight_sorted, dweight, (offset,))
        return (dx_sorted, dweight_sorted), dw

    positions = order.slot_of.shape[0]
    empty = jnp.zeros((positions, x_XD.shape[1]), x_XD.dtype), jnp.zeros(positions, jnp.float32)
    (dx_sorted, dweight_sorted), dtrained = _over_experts(
        blocks, order, (weights, seed_E), dtrained, block, empty
    )
    at_XK, real_XK = order.position_of.reshape(expert_XK.shape), expert_XK < experts
    dx = sum_choices(dx_sorted, at_XK, real_XK)
    dweight = jnp.where(real_XK, dweight_sorted[at_XK], 0.0)
    return dtrained, dx.astype(x_XD.dtype), dweight
