"""The state of a batch of sequences between two programs, and the programs that change it.

Rows come and go independently: `insert` puts a prefilled prompt into a row and chooses its first
token, `advance` decodes a number of tokens for all active rows, `grow` makes the ring longer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unimoe_jax.generation.sampling import Choice, choose
from unimoe_jax.models.served import ServedDecoder, Weights
from unimoe_jax.nn.decode_attention import KVCache

NOTHING = -1
"""In place of a token of a row that is not active."""


class Rows(NamedTuple):
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
    rows: Rows


class Newcomer(NamedTuple):
    """A prompt that takes row `row`; it is row `source` of the prefilled batch."""

    row: jax.Array
    source: jax.Array
    length: jax.Array
    limit: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    seed: jax.Array


class Produced(NamedTuple):
    """token_NB int32, NOTHING where a row was idle; what was traced, else None: expert_NLBK int32,
    logits_NBV float32 that the tokens were chosen from."""

    token_NB: jax.Array
    expert_NLBK: jax.Array | None
    logits_NBV: jax.Array | None


def empty_rows(batch: int) -> Rows:
    """All rows idle."""

    def zeros(dtype: Any) -> jax.Array:
        return jnp.zeros(batch, dtype)

    choice = Choice(zeros(jnp.float32), zeros(jnp.float32), zeros(jnp.int32), zeros(jnp.uint32))
    counts = [zeros(jnp.int32) for _ in range(4)]
    return Rows(*counts, zeros(bool), choice)


def insert(
    eos: tuple[int, ...],
    greedy_only: bool,
    state: State,
    caches: tuple[KVCache, ...],
    logits_RV: jax.Array,
    new: Newcomer,
) -> tuple[State, jax.Array]:
    """The state with a prompt in a row, and the first token of its answer.

    caches: of the prefilled batch, position p in slot p.
    """
    slots = state.caches[0].slots
    # The last token of the prompt goes behind the cursor, the others before it, around the ring.
    shift = state.cursor - new.length

    def put(ring: jax.Array, part: jax.Array, axis: int) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(part, new.source, axis=0)
        pad = [(0, slots - row.shape[dim] if dim == axis else 0) for dim in range(row.ndim)]
        row = jnp.roll(jnp.pad(row, pad), shift, axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(ring, row, new.row, axis=0)

    merged = tuple(
        KVCache(put(ring.k, part.k, 3), put(ring.v, part.v, 2))
        for ring, part in zip(state.caches, caches, strict=True)
    )
    logits_1V = jax.lax.dynamic_index_in_dim(logits_RV, new.source, axis=0)
    choice = Choice(*(a[None] for a in (new.temperature, new.top_p, new.top_k, new.seed)))
    token = choose(logits_1V, choice, jnp.zeros(1, jnp.int32), greedy_only)[0]
    more = (new.limit > 1) & ~_ends(token, eos)
    one = jnp.int32(1)
    values = Rows(new.length, token, one, new.limit, more, Choice(*(a[0] for a in choice)))
    rows = jax.tree.map(lambda a, value: a.at[new.row].set(value), state.rows, values)
    return State(merged, state.cursor, rows), token


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
    decoder: ServedDecoder,
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
    _, state, produced = jax.lax.while_loop(running, body, (jnp.int32(0), state, start))
    return state, produced


def _one_token(
    decoder: ServedDecoder, eos: tuple[int, ...], greedy_only: bool, weights: Weights, state: State
) -> tuple[State, Produced]:
    """One token for every active row; everything is traced, without the leading axis."""
    rows = state.rows
    out = decoder.step(weights, state.caches, rows.token_B, state.cursor, rows.length_B)
    chosen_B = choose(out.logits_BV, rows.choice, rows.count_B, greedy_only)
    active = rows.active_B
    count_B = rows.count_B + active
    done_B = _ends(chosen_B, eos) | (count_B >= rows.limit_B)
    new_rows = Rows(
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
