"""Experts applied to the rows that were routed to them, on one device: sorted, in blocks, dropless.

A slot is one choice of an expert by a token. Slots are sorted by expert, and the rows of each
expert are processed in large blocks followed by a tail of smaller ones. The rows that are
multiplied are therefore the rows that were routed, plus a few rows of padding.

Forward and backward pass are plain functions, which dispatch.py joins in one custom gradient.
Neither the permuted tokens nor the outputs of experts are kept between them. The results of an
expert's first layers are kept on request; otherwise the backward pass computes every block again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unimoe_jax.nn.moe.experts import ExpertFunction

# Block sizes by platform. On a CPU a block must fit the caches. There is no size of 64, because one
# block of 64 rows takes a CPU as long as two blocks of 32. On accelerators a large block amortises
# reading the expert's weights, and the sum of their gradients, from memory.
BLOCKS = {"cpu": (512, 256, 128, 32)}
ACCELERATOR_BLOCKS = (2048, 1024, 512, 256, 128)
IN_PLACE = ("tpu",)
"""Platforms on which blocks read the weights where they are stored, see `Blocks`."""


class Routed(NamedTuple):
    """Tokens with the experts that they were routed to.

    x_XD: tokens.
    expert_XK: int32 in [0, E]; E means "no expert" and costs nothing.
    weight_XK: float32.
    row_X: uint32, the number of each token in the whole batch.
    """

    x_XD: jax.Array
    expert_XK: jax.Array
    weight_XK: jax.Array
    row_X: jax.Array


class Blocks(NamedTuple):
    """How the rows of an expert are processed.

    sizes: rows per block, the largest size first.
    in_place: whether every block reads its expert's weights from the stacked weights of all
        experts. A TPU can multiply a part of an array where it is stored, and copying an expert's
        weights out of the stack takes it as long as hundreds of rows. On other platforms every
        block would copy the weights again, so they are copied once per expert, before its blocks.
    """

    sizes: tuple[int, ...]
    in_place: bool


class _Order(NamedTuple):
    """The S = X·K slots (numbered token by token), sorted by expert.

    expert_of: [S], the expert of each slot; E means none.
    slot_of: [S + largest block], the slot at each sorted position, and padding at the end.
    position_of: [S], the sorted position of each slot.
    start, load: [E], the first sorted position and the number of rows of each expert.
    """

    expert_of: jax.Array
    slot_of: jax.Array
    position_of: jax.Array
    start: jax.Array
    load: jax.Array


def _sort_slots(expert_XK: jax.Array, experts: int, padding: int) -> _Order:
    """Sort slots by expert with a counting sort, which is cheaper than argsort.

    Example: three tokens choose the experts 1, 0 and 1 of two. The experts have the loads (1, 2)
    and start at the sorted positions (0, 1). The slots go to the positions (1, 0, 2), so slot_of is
    (1, 0, 2) followed by padding.
    """
    slot_expert = expert_XK.reshape(-1)
    # rank[s, e]: the number of slots up to s that go to expert e. "No expert" comes last.
    chosen = slot_expert[:, None] == jnp.arange(experts + 1)[None]
    rank = jnp.cumsum(chosen.astype(jnp.int32), axis=0)
    load = rank[-1]
    start = jnp.cumsum(load) - load
    # The position of a slot is the start of its expert plus its rank within the expert.
    rank_of = jnp.take_along_axis(rank, slot_expert[:, None], axis=1)[:, 0] - 1
    position_of = start[slot_expert] + rank_of
    slots = jnp.arange(slot_expert.shape[0], dtype=jnp.int32)
    slot_of = jnp.zeros(slots.shape[0] + padding, jnp.int32).at[position_of].set(slots)
    return _Order(slot_expert, slot_of, position_of, start[:experts], load[:experts])


def blocks_for(mean_load: int, platform: str) -> Blocks:
    """Return the blocks of a platform for experts with `mean_load` rows on average.

    Sizes above the mean load are left out; if all are above it, the smallest size remains.
    """
    sizes = BLOCKS.get(platform, ACCELERATOR_BLOCKS)
    sizes = tuple(size for size in sizes if size <= mean_load) or sizes[-1:]
    return Blocks(sizes, in_place=platform in IN_PLACE)


def block_trips(remaining, size: int, smallest: int):
    """Return how many blocks of `size` rows to use for `remaining` rows (an int or an array).

    The last block is used although it is not full, if at most 1/8 of it is padding, or if the
    padding is smaller than the smallest block. In the first case smaller blocks would cost more,
    because every block reads the expert's weights and adds to their gradient, which takes about as
    long as multiplying 35 rows. In the second case smaller blocks would multiply as many rows.

    Example: with the sizes 512, 256, 128 and 32, 1000 rows take two blocks of 512, of which 24 rows
    are padding. 900 rows take one block of each size, 928 rows in all.
    """
    return (remaining + max(size // 8, smallest - 1)) // size


def _over_blocks(sizes: tuple[int, ...], start, count, body, carry):
    """Fold `body(carry, offset, size)` over blocks that cover `count` rows from `start` on."""
    done = jnp.zeros_like(count)
    for size in sizes:
        remaining = jnp.maximum(count - done, 0)
        trips = block_trips(remaining, size, sizes[-1])
        base = start + done

        def step(i, carry, size=size, base=base):
            # The offset has to depend on the loop index. Otherwise XLA would move the body of a
            # loop with at most one trip out of the loop, and would always run it.
            return body(carry, base + i * size, size)

        carry = jax.lax.fori_loop(0, trips, step, carry)
        done = done + trips * size
    return carry


def _over_experts(
    blocks: Blocks, order: _Order, weights: Any, sums: list[jax.Array], block: Callable, carry: Any
) -> tuple[Any, list[jax.Array]]:
    """Fold `block` over all blocks of all experts, and return (carry, sums).

    Args:
        weights: pytree of arrays [E,…].
        sums: arrays [E,…], to which the results of the blocks of each expert are added.
        block: `block(carry, w, offset, size, end)` returns (carry, terms). `w` is the part of
            `weights` of the expert, its rows are the sorted positions before `end`, and `terms` are
            added to its part of `sums`.
    """

    def read(offset):
        # Look the expert up inside the loop over blocks. If its number were known outside, XLA
        # would move the slice out of the loop and copy the weights.
        number = order.expert_of[order.slot_of[offset]]
        part = partial(jax.lax.dynamic_index_in_dim, index=number, axis=0, keepdims=False)
        return jax.tree.map(part, weights)

    def one_expert(carry, expert):
        copied_w, expert_sums, start, load = expert

        def step(state, offset, size):
            carry, expert_sums = state
            w = read(offset) if blocks.in_place else copied_w
            carry, terms = block(carry, w, offset, size, start + load)
            added = [a + b.astype(a.dtype) for a, b in zip(expert_sums, terms, strict=True)]
            return carry, added

        return _over_blocks(blocks.sizes, start, load, step, (carry, expert_sums))

    # The scan copies an expert's weights out of the stack, unless blocks read them in place.
    copied = None if blocks.in_place else weights
    return jax.lax.scan(one_expert, carry, (copied, sums, order.start, order.load))


def sum_choices(
    rows: jax.Array,
    place_XK: jax.Array,
    wanted_XK: jax.Array,
    weight_XK: jax.Array | None = None,
) -> jax.Array:
    """Return Σ_k weight[x,k] · rows[place[x,k]] over the choices that are wanted, float32 [X,D].

    Args:
        rows: arrays of any float dtype [·,D].
        place_XK: the row of each choice.
        wanted_XK: bool, the choices that are added.
        weight_XK: float32 factors; None means 1.
    """
    total = jnp.zeros((place_XK.shape[0], rows.shape[1]), jnp.float32)
    # Add one choice at a time. All at once would hold K rows of float32 per token.
    for k in range(place_XK.shape[1]):
        wanted = wanted_XK[:, k]
        chosen = rows[jnp.where(wanted, place_XK[:, k], 0)].astype(jnp.float32)
        chosen = chosen if weight_XK is None else chosen * weight_XK[:, k, None]
        total += jnp.where(wanted[:, None], chosen, 0.0)
    return total


# --------------------------------------------------------------------------------- forward


def forward(
    expert_fn: ExpertFunction,
    weights: Any,
    rows: Routed,
    seed_E: jax.Array,
    blocks: Blocks,
    keep: bool = False,
) -> tuple[jax.Array, Any]:
    """Return y[x] = Σ_k weight[x,k] · expert_fn(weights[expert[x,k]], x[x]), and what is kept.

    Args:
        weights: pytree with a leading axis of E experts.
        seed_E: uint32, the seed of each expert's adapter dropout.
        blocks: see `blocks_for`.
        keep: whether to return the results of `expert_fn.first_layers` for `backward`.

    Returns:
        y, [X,features] in the dtype of x, and the results of the first layers of every slot in
        sorted order, or None without `keep`.
    """
    x_XD, expert_XK, weight_XK, row_X = rows
    experts, top_k = jax.tree.leaves(weights)[0].shape[0], expert_XK.shape[1]
    order = _sort_slots(expert_XK, experts, blocks.sizes[0])

    def compute(expert, x, row):
        w, seed = expert
        pre_activations = expert_fn.first_layers(w, x, row, seed)
        y = expert_fn.later_layers(w, pre_activations, row, seed)
        return y, pre_activations if keep else None

    def block(out, expert, offset, size, end):
        del end
        token = jax.lax.dynamic_slice(order.slot_of, (offset,), (size,)) // top_k
        # A tail block may write into the rows of the next expert, which overwrites them later.
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=offset, axis=0)
        return jax.tree.map(write, out, compute(expert, x_XD[token], row_X[token])), []

    # Allocate the sorted outputs: trace one expert on one row to learn their widths and dtypes.
    stacked = (weights, seed_E)
    first_expert = jax.tree.map(lambda w: w[0], stacked)
    shapes = jax.eval_shape(compute, first_expert, x_XD[:1], row_X[:1])
    positions = order.slot_of.shape[0]
    empty = jax.tree.map(lambda s: jnp.zeros((positions, *s.shape[1:]), s.dtype), shapes)

    # Compute all blocks, and add up the choices of every token.
    (y_sorted, kept), _ = _over_experts(blocks, order, stacked, [], block, empty)
    # Slots without an expert were never computed, and their rows may hold what a tail block wrote.
    place_XK, real_XK = order.position_of.reshape(expert_XK.shape), expert_XK < experts
    return sum_choices(y_sorted, place_XK, real_XK, weight_XK).astype(x_XD.dtype), kept


# -------------------------------------------------------------------------------- backward


def selected(items: Sequence, flags: Sequence[bool]) -> list:
    """Return the items whose flag is set."""
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def _replaced(weights: Any, flags: Sequence[bool], replacements: Sequence) -> Any:
    """Return weights with the arrays whose flag is set replaced, in order."""
    leaves, treedef = jax.tree.flatten(weights)
    new = iter(replacements)
    flagged = zip(leaves, flags, strict=True)
    return treedef.unflatten([next(new) if flag else leaf for leaf, flag in flagged])


class _BlockRows(NamedTuple):
    """The rows of a block: tokens, their combine weights, and their numbers in the batch."""

    x: jax.Array
    weight: jax.Array
    row: jax.Array


def _block_gradients(
    expert_fn: ExpertFunction,
    w: Any,
    trained: Sequence[bool],
    rows: _BlockRows,
    seed: jax.Array,
    g: jax.Array,
    kept: Any,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Return the gradients of an expert's trained weights, of the rows, and of their weights.

    Args:
        w: the weights of the expert.
        trained: one flag per array of `w`.
        g: the gradient of y for the rows.
        kept: the results of the first layers as `forward` kept them, or None.
    """
    x, weight, row = rows

    def first_layers(trained_w, x):
        return expert_fn.first_layers(_replaced(w, trained, trained_w), x, row, seed)

    def later_layers(trained_w, pre_activations, scale):
        whole = _replaced(w, trained, trained_w)
        return expert_fn.later_layers(whole, pre_activations, row, seed, scale)

    trained_w = selected(jax.tree.leaves(w), trained)
    computed, pull_first = jax.vjp(first_layers, trained_w, x)
    # If results were kept, nothing reads `computed`, and the compiler removes its products.
    pre_activations = computed if kept is None else kept
    _, pull_later = jax.vjp(later_layers, trained_w, pre_activations, weight)
    dw_later, dpre_activations, dweight = pull_later(g)
    dw_first, dx = pull_first(dpre_activations)
    dw = [a + b for a, b in zip(dw_first, dw_later, strict=True)]
    return dw, dx, dweight.astype(jnp.float32)


def backward(
    expert_fn: ExpertFunction,
    weights: Any,
    trained: Sequence[bool],
    rows: Routed,
    seed_E: jax.Array,
    blocks: Blocks,
    g_XD: jax.Array,
    dtrained: list[jax.Array],
    kept: Any = None,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Return the gradients of the trained weights (added to `dtrained`), of x, and of weight_XK.

    Args:
        trained: one flag per array of `weights`, in the order of `jax.tree.leaves`.
        g_XD: the gradient of the y that `forward` returns.
        dtrained: float32 arrays with the shapes of the flagged weights.
        kept: the second result of `forward`, or None if nothing was kept.
    """
    x_XD, expert_XK, weight_XK, row_X = rows
    experts, top_k = jax.tree.leaves(weights)[0].shape[0], expert_XK.shape[1]
    order = _sort_slots(expert_XK, experts, blocks.sizes[0])
    slot_weight = weight_XK.reshape(-1)

    def block(carry, expert, offset, size, end):
        (w, seed), (dx_sorted, dweight_sorted) = expert, carry
        # Read the rows of the block. Behind the last row of the expert, repeat that row with a
        # gradient of zero: the row of another expert could overflow float16 in this expert, and
        # 0 · inf would be NaN.
        slot = jax.lax.dynamic_slice(order.slot_of, (offset,), (size,))
        is_row = offset + jnp.arange(size) < end
        slot = jnp.where(is_row, slot, order.slot_of[end - 1])
        token = slot // top_k
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=offset, slice_size=size, axis=0)
        g = jnp.where(is_row[:, None], g_XD[token], 0).astype(expert_fn.dtype)
        block_rows = _BlockRows(x_XD[token], slot_weight[slot], row_X[token])
        block_kept = None if kept is None else jax.tree.map(cut, kept)
        # Compute the gradients, and write those of rows to their sorted positions.
        dw, dx, dweight = _block_gradients(expert_fn, w, trained, block_rows, seed, g, block_kept)
        dx_sorted = jax.lax.dynamic_update_slice_in_dim(dx_sorted, dx, offset, axis=0)
        dweight_sorted = jax.lax.dynamic_update_slice(dweight_sorted, dweight, (offset,))
        return (dx_sorted, dweight_sorted), dw

    positions = order.slot_of.shape[0]
    empty = jnp.zeros((positions, x_XD.shape[1]), x_XD.dtype), jnp.zeros(positions, jnp.float32)
    (dx_sorted, dweight_sorted), dtrained = _over_experts(
        blocks, order, (weights, seed_E), dtrained, block, empty
    )
    # Add up the gradients of a token's choices, and bring those of weights into token order.
    place_XK, real_XK = order.position_of.reshape(expert_XK.shape), expert_XK < experts
    dx = sum_choices(dx_sorted, place_XK, real_XK)
    dweight = jnp.where(real_XK, dweight_sorted[place_XK], 0.0)
    return dtrained, dx.astype(x_XD.dtype), dweight
