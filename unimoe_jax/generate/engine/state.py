"""The state of a decoding batch, and the functions that change it: insert, grow, advance.

All three are pure and are compiled by `decoding_programs`. `insert` puts a prefilled prompt into a
row and chooses its first token, `advance` decodes up to MAX_STEPS tokens for every active row, and
`grow` makes the rings longer. Every row starts and ends independently of the others.

Letters: B rows of the batch, R rows of a prefill program, S slots of a ring, N steps of one call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.generate.engine.sampling import RowSampling, choose_tokens
from unimoe_jax.models.inference_decoder import InferenceDecoder, Weights
from unimoe_jax.nn.attention.decode import KVCache

NO_TOKEN = -1
"""Stands in place of a token where a row was not active."""
MAX_STEPS = 16
"""Tokens per row that one call of the decoding program can generate."""


class DecodingRows(NamedTuple):
    """The B rows of a batch.

    length_B: int32, tokens in the cache. token_B: int32, the newest token, which is not in the
    cache yet. count_B: int32, tokens generated so far. limit_B: int32, tokens to generate at most.
    active_B: bool, whether the row goes on. sampling: how its tokens are chosen.
    """

    length_B: jax.Array
    token_B: jax.Array
    count_B: jax.Array
    limit_B: jax.Array
    active_B: jax.Array
    sampling: RowSampling


class State(NamedTuple):
    """A whole batch.

    caches: one ring of S slots per layer. cursor: int32, the slot, modulo S, that the next token of
    every row is written to. rows: everything else.
    """

    caches: tuple[KVCache, ...]
    cursor: jax.Array
    rows: DecodingRows


class NewRows(NamedTuple):
    """Prompts that enter a batch, in the order of the R rows of their prefill program.

    row_R: int32, the row of the batch that a prompt takes. length_R: int32, its positions.
    limit_R: int32, tokens to generate at most. sampling: arrays [R].
    """

    row_R: jax.Array
    length_R: jax.Array
    limit_R: jax.Array
    sampling: RowSampling


class Produced(NamedTuple):
    """Everything that up to N steps have generated.

    token_NB: int32, NO_TOKEN where a row was not active. expert_NLBK: int32, experts of L MoE
    layers; logits_NBV: float32, from which the tokens were chosen. Each of these two is None if it
    is not traced.
    """

    token_NB: jax.Array
    expert_NLBK: jax.Array | None
    logits_NBV: jax.Array | None


def empty_rows(batch: int) -> DecodingRows:
    """Rows that are not active."""

    def zeros(dtype: Any) -> jax.Array:
        return jnp.zeros(batch, dtype)

    return DecodingRows(
        length_B=zeros(jnp.int32),
        token_B=zeros(jnp.int32),
        count_B=zeros(jnp.int32),
        limit_B=zeros(jnp.int32),
        active_B=zeros(bool),
        sampling=RowSampling(
            zeros(jnp.float32), zeros(jnp.float32), zeros(jnp.int32), zeros(jnp.uint32)
        ),
    )


def empty_new_rows(rows: int) -> NewRows:
    """Host arrays of zeros [R], to be filled in."""
    shapes = jax.eval_shape(lambda: empty_rows(rows))
    new = NewRows(shapes.length_B, shapes.length_B, shapes.limit_B, shapes.sampling)
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), new)


# ------------------------------------------------------------------------------------- insert


def insert(
    state: State,
    caches: tuple[KVCache, ...],
    logits_RV: jax.Array,
    new: NewRows,
    count: jax.Array,
    *,
    eos: tuple[int, ...],
    greedy_only: bool,
) -> tuple[State, jax.Array]:
    """Put the first `count` prefilled prompts into rows and choose their first tokens.

    caches: one per layer from the prefill program, position p in slot p. logits_RV: of the last
    position of every prompt. eos, greedy_only: static. Returns the new state and token_R, int32,
    NO_TOKEN for rows of the prefill program that hold no prompt.

    All rows of a batch write at one cursor, so a prompt's keys are rotated until its last token is
    in the slot before the cursor. Example with a ring of 8 slots and a prompt of 3 tokens a, b, c:
    with cursor 5 the ring holds `. . a b c . . .`, with cursor 1 it wraps to `c . . . . . a b`.
    """

    def insert_prompt(source: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, token_R = carry
        row, length, limit, sampling = jax.tree.map(lambda a: a[source], new)
        shift = state.cursor - length

        def put(ring: jax.Array, prefilled: jax.Array, axis: int) -> jax.Array:
            """Write one prompt's slots, which lie along `axis`, into its row of the ring."""
            slots = jax.lax.dynamic_index_in_dim(prefilled, source, axis=0)
            pad = [(0, ring.shape[axis] - slots.shape[axis] if a == axis else 0) for a in range(4)]
            slots = jnp.roll(jnp.pad(slots, pad), shift, axis=axis)
            return jax.lax.dynamic_update_slice_in_dim(ring, slots, row, axis=0)

        # Keys are [B,K,H,S] and values [B,K,S,H], see KVCache.
        rings = tuple(
            KVCache(put(ring.k, prefilled.k, 3), put(ring.v, prefilled.v, 2))
            for ring, prefilled in zip(state.caches, caches, strict=True)
        )
        logits_1V = jax.lax.dynamic_index_in_dim(logits_RV, source, axis=0)
        row_sampling = jax.tree.map(lambda a: a[None], sampling)
        token = choose_tokens(logits_1V, row_sampling, jnp.zeros(1, jnp.int32), greedy_only)[0]
        # The answer may be complete with its first token.
        active = (limit > 1) & ~_is_end(token, eos)
        values = DecodingRows(length, token, jnp.int32(1), limit, active, sampling)
        rows = jax.tree.map(lambda a, value: a.at[row].set(value), state.rows, values)
        return State(rings, state.cursor, rows), token_R.at[source].set(token)

    no_tokens = jnp.full(len(new.row_R), NO_TOKEN, jnp.int32)
    return jax.lax.fori_loop(0, count, insert_prompt, (state, no_tokens))


def _is_end(token: jax.Array, eos: tuple[int, ...]) -> jax.Array:
    """Whether tokens are end tokens, bool of the same shape."""
    return jnp.isin(token, jnp.array(eos, jnp.int32)) if eos else jnp.zeros(token.shape, bool)


# --------------------------------------------------------------------------------------- grow


def grow(state: State, *, slots: int) -> State:
    """The same state with rings of `slots` (static): first the old slots, oldest first, then empty
    ones.

    Example: a ring of 4 slots with cursor 6 holds the tokens `4 5 2 3` (the next one would replace
    token 2 in slot 6 mod 4). Grown to 8 slots it holds `2 3 4 5 . . . .` with cursor 4.
    """

    def longer(ring: jax.Array, axis: int) -> jax.Array:
        pad = [(0, slots - ring.shape[dim] if dim == axis else 0) for dim in range(ring.ndim)]
        return jnp.pad(jnp.roll(ring, -state.cursor, axis=axis), pad)

    old_slots = state.caches[0].slots
    caches = tuple(KVCache(longer(ring.k, 3), longer(ring.v, 2)) for ring in state.caches)
    return State(caches, jnp.full_like(state.cursor, old_slots), state.rows)


# ------------------------------------------------------------------------------------ advance


def advance(
    weights: Weights,
    state: State,
    steps: jax.Array,
    stop_early: jax.Array,
    *,
    decoder: InferenceDecoder,
    eos: tuple[int, ...],
    greedy_only: bool,
    max_steps: int,
    trace: frozenset[str],
) -> tuple[State, Produced]:
    """Generate up to `steps` tokens for every active row; the keyword arguments are static.

    steps: int32, at most max_steps, which is the number N of entries in the result. stop_early:
    bool; return as soon as a row is finished, because another prompt waits for its place. trace:
    may hold "experts" and "logits".
    """
    active_at_start = jnp.sum(state.rows.active_B)

    def goes_on(carry):
        number, state, _ = carry
        active = jnp.sum(state.rows.active_B)
        return (number < steps) & (active > 0) & ~(stop_early & (active < active_at_start))

    def step(carry):
        number, state, produced = carry
        state, new = _one_token(decoder, eos, greedy_only, weights, state)
        produced = jax.tree.map(
            lambda all_steps, value: all_steps.at[number].set(value),
            produced,
            _only_traced(new, trace),
        )
        return number + 1, state, produced

    # Arrays for the results of all steps, from the shapes of one step's results.
    _, shapes = jax.eval_shape(lambda: _one_token(decoder, eos, greedy_only, weights, state))
    empty = jax.tree.map(lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), shapes)
    empty = empty._replace(token_NB=jnp.full_like(empty.token_NB, NO_TOKEN))
    start = _only_traced(empty, trace)
    # A loop that carries an axis of one row would copy the cache in every step, see KVCache.
    is_single = len(state.rows.token_B) == 1
    if is_single:
        state = state._replace(caches=jax.tree.map(lambda ring: ring[0], state.caches))
    _, state, produced = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, start))
    if is_single:
        state = state._replace(caches=jax.tree.map(lambda ring: ring[None], state.caches))
    return state, produced


def _one_token(
    decoder: InferenceDecoder,
    eos: tuple[int, ...],
    greedy_only: bool,
    weights: Weights,
    state: State,
) -> tuple[State, Produced]:
    """One step for every row. The result has everything that can be traced, without the axis N."""
    rows = state.rows
    # Feed the newest token of every row; inactive rows are computed as well and ignored.
    out = decoder.step(weights, state.caches, rows.token_B, state.cursor, rows.length_B)
    chosen_B = choose_tokens(out.logits_BV, rows.sampling, rows.count_B, greedy_only)
    active_B = rows.active_B
    count_B = rows.count_B + active_B
    done_B = _is_end(chosen_B, eos) | (count_B >= rows.limit_B)
    new_rows = DecodingRows(
        length_B=rows.length_B + active_B,
        token_B=jnp.where(active_B, chosen_B, rows.token_B),
        count_B=count_B,
        limit_B=rows.limit_B,
        active_B=active_B & ~done_B,
        sampling=rows.sampling,
    )
    token_B = jnp.where(active_B, chosen_B, NO_TOKEN)
    # Drop the time axis of expert_LBTK, which has one entry.
    produced = Produced(token_B, out.expert_LBTK[:, :, 0], out.logits_BV)
    return State(out.caches, state.cursor + 1, new_rows), produced


def _only_traced(produced: Produced, trace: frozenset[str]) -> Produced:
    """Set the fields that are not traced to None, so that the loop does not carry them."""
    return produced._replace(
        expert_NLBK=produced.expert_NLBK if "experts" in trace else None,
        logits_NBV=produced.logits_NBV if "logits" in trace else None,
    )
