"""The state of a batch of sequences between two programs, and the programs that change it.

Rows come and go independently: `insert` puts a prefilled prompt into a row and chooses its first
token, `advance` decodes a number of tokens for all active rows, `grow` makes the ring longer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.generate.engine.sampling import Choice, choose
from unimoe_jax.models.inference_decoder import InferenceDecoder, Weights
from unimoe_jax.nn.attention.decode import KVCache

NOTHING = -1
"""In place of a token of a row that is not active."""
MOST_STEPS = 16
"""Tokens per row that one call of the decoding program may make."""


class DecodingRows(NamedTuple):
    """B rows. length: tokens in the cache. token: the newest, not in the cache yet. count: tokens
    generated; at most limit. choice: how they are chosen."""

    length_B: jax.Array
    token_B: jax.Array
    count_B: jax.Array
    limit_B: jax.Array
    active_B: jax.Array
    choice: Choice


class State(NamedTuple):
    """caches: one ring per layer. cursor: int32, where all of them are written next."""

    caches: tuple[KVCache, ...]
    cursor: jax.Array
    rows: DecodingRows


class Newcomers(NamedTuple):
    """Prompts that take rows: those in the first rows of the prefilled batch; fields [R]."""

    row: jax.Array
    length: jax.Array
    limit: jax.Array
    choice: Choice


class Produced(NamedTuple):
    """token_NB int32, NOTHING where a row was idle; what was traced, else None: expert_NLBK int32,
    logits_NBV float32 that the tokens were chosen from."""

    token_NB: jax.Array
    expert_NLBK: jax.Array | None
    logits_NBV: jax.Array | None


def empty_rows(batch: int) -> DecodingRows:
    """All rows idle."""

    def zeros(dtype: Any) -> jax.Array:
        return jnp.zeros(batch, dtype)

    choice = Choice(zeros(jnp.float32), zeros(jnp.float32), zeros(jnp.int32), zeros(jnp.uint32))
    counts = [zeros(jnp.int32) for _ in range(4)]
    return DecodingRows(*counts, zeros(bool), choice)


def no_newcomers(rows: int) -> Newcomers:
    """Host arrays of zeros, to be filled in."""
    empty = jax.eval_shape(lambda: empty_rows(rows))
    new = Newcomers(empty.length_B, empty.length_B, empty.limit_B, empty.choice)
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), new)


def insert(
    eos: tuple[int, ...],
    greedy_only: bool,
    state: State,
    caches: tuple[KVCache, ...],
    logits_RV: jax.Array,
    new: Newcomers,
    count: jax.Array,
) -> tuple[State, jax.Array]:
    """The state with the first `count` prompts in rows, and token_R: the first of each answer.

    caches: of the prefilled batch, position p in slot p.
    """

    def one(source: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, token_R = carry
        row, length, limit, choice = jax.tree.map(lambda a: a[source], new)
        # Its last token goes behind the cursor, the others before it, around the ring.
        shift = state.cursor - length

        def put(ring: jax.Array, part: jax.Array, axis: int) -> jax.Array:
            slots = jax.lax.dynamic_index_in_dim(part, source, axis=0)
            pad = [(0, ring.shape[axis] - slots.shape[axis] if a == axis else 0) for a in range(4)]
            slots = jnp.roll(jnp.pad(slots, pad), shift, axis=axis)
            return jax.lax.dynamic_update_slice_in_dim(ring, slots, row, axis=0)

        rings = tuple(
            KVCache(put(ring.k, part.k, 3), put(ring.v, part.v, 2))
            for ring, part in zip(state.caches, caches, strict=True)
        )
        logits_1V = jax.lax.dynamic_index_in_dim(logits_RV, source, axis=0)
        alone = jax.tree.map(lambda a: a[None], choice)
        token = choose(logits_1V, alone, jnp.zeros(1, jnp.int32), greedy_only)[0]
        more = (limit > 1) & ~_ends(token, eos)
        values = DecodingRows(length, token, jnp.int32(1), limit, more, choice)
        rows = jax.tree.map(lambda a, value: a.at[row].set(value), state.rows, values)
        return State(rings, state.cursor, rows), token_R.at[source].set(token)

    nothing = jnp.full(len(new.row), NOTHING, jnp.int32)
    return jax.lax.fori_loop(0, count, one, (state, nothing))


def _ends(token: jax.Array, eos: tuple[int, ...]) -> jax.Array:
    return jnp.isin(token, jnp.array(eos, jnp.int32)) if eos else jnp.zeros(token.shape, bool)


def grow(slots: int, state: State) -> State:
    """The same state with rings of `slots`: what they hold, oldest first, then empty slots."""

    def longer(ring: jax.Array, axis: int) -> jax.Array:
        pad = [(0, slots - ring.shape[dim] if dim == axis else 0) for dim in range(ring.ndim)]
        return jnp.pad(jnp.roll(ring, -state.cursor, axis=axis), pad)

    old = state.caches[0].slots
    caches = tuple(KVCache(longer(c.k, 3), longer(c.v, 2)) for c in state.caches)
    return State(caches, jnp.full_like(state.cursor, old), state.rows)


def advance(
    decoder: InferenceDecoder,
    eos: tuple[int, ...],
    greedy_only: bool,
    most: int,
    trace: frozenset[str],
    weights: Weights,
    state: State,
    steps: jax.Array,
    stop_early: jax.Array,
) -> tuple[State, Produced]:
    """Up to `steps` (at most `most`, static) tokens for every active row.

    stop_early: bool; return as soon as a row is finished, because another waits for its place.
    trace: may hold "experts" and "logits".
    """
    batch = len(state.rows.token_B)
    was_active = jnp.sum(state.rows.active_B)

    def running(carry):
        number, state, _ = carry
        active = jnp.sum(state.rows.active_B)
        return (number < steps) & (active > 0) & ~(stop_early & (active < was_active))

    def body(carry):
        number, state, produced = carry
        state, seen = _one_token(decoder, eos, greedy_only, weights, state)
        produced = jax.tree.map(
            lambda kept, new: kept.at[number].set(new), produced, _traced(seen, trace)
        )
        return number + 1, state, produced

    def look() -> tuple[jax.Array, jax.Array]:
        rows = state.rows
        out = decoder.step(weights, state.caches, rows.token_B, state.cursor, rows.length_B)
        return out.expert_LBTK[:, :, 0], out.logits_BV

    experts, logits = (jnp.zeros((most, *s.shape), s.dtype) for s in jax.eval_shape(look))
    empty = Produced(jnp.full((most, batch), NOTHING, jnp.int32), experts, logits)
    start = _traced(empty, trace)
    alone = batch == 1
    if alone:  # see KVCache
        state = state._replace(caches=jax.tree.map(lambda ring: ring[0], state.caches))
    _, state, produced = jax.lax.while_loop(running, body, (jnp.int32(0), state, start))
    if alone:
        state = state._replace(caches=jax.tree.map(lambda ring: ring[None], state.caches))
    return state, produced


def _one_token(
    decoder: InferenceDecoder,
    eos: tuple[int, ...],
    greedy_only: bool,
    weights: Weights,
    state: State,
) -> tuple[State, Produced]:
    """One token for every active row; everything is traced, without the leading axis."""
    rows = state.rows
    out = decoder.step(weights, state.caches, rows.token_B, state.cursor, rows.length_B)
    chosen_B = choose(out.logits_BV, rows.choice, rows.count_B, greedy_only)
    active = rows.active_B
    count_B = rows.count_B + active
    done_B = _ends(chosen_B, eos) | (count_B >= rows.limit_B)
    new_rows = DecodingRows(
        rows.length_B + active,
        jnp.where(active, chosen_B, rows.token_B),
        count_B,
        rows.limit_B,
        active & ~done_B,
        rows.choice,
    )
    token_B = jnp.where(active, chosen_B, NOTHING)
    seen = Produced(token_B, out.expert_LBTK[:, :, 0], out.logits_BV)
    return State(out.caches, state.cursor + 1, new_rows), seen


def _traced(produced: Produced, trace: frozenset[str]) -> Produced:
    return produced._replace(
        expert_NLBK=produced.expert_NLBK if "experts" in trace else None,
        logits_NBV=produced.logits_NBV if "logits" in trace else None,
    )
