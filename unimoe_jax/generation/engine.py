"""Prompts in, tokens out: prefill, rows of a batch that come and go, decoding in steps.

The engine knows token ids and soft tokens, not text, files or programs of a command line. A
sequence waits, is prefilled, takes a free row, and leaves it when it is done; others go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from unimoe_jax.generation import state as states
from unimoe_jax.generation.errors import GenerationError
from unimoe_jax.generation.programs import Programs, prompt_bucket, ring_bucket
from unimoe_jax.generation.request import Sampling
from unimoe_jax.generation.state import Newcomer, State
from unimoe_jax.models.served import ServedDecoder, Step, Weights
from unimoe_jax.nn.decode_attention import KVCache

MOST_STEPS = 16
"""Tokens per row that one call of the decoding program may make."""


@dataclass
class Sequence:
    """One prompt and what has come of it.

    token_id, modality, slot: int32 [T] as in `Batch`; soft: [P,D] soft tokens that slots refer to.
    sampling: complete (`Sampling.checked`). tokens: generated so far. experts: traced, [L,n,K] for
    the prompt and then for every token fed; logits: traced, [V] per token.
    """

    token_id: np.ndarray
    modality: np.ndarray
    slot: np.ndarray
    soft: np.ndarray
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    stop: Literal["eos", "length"] | None = None
    experts: list[np.ndarray] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.token_id)

    @property
    def full_length(self) -> int:
        """Positions it may come to take."""
        return self.prompt_length + self.sampling.max_new_tokens

    @property
    def cached(self) -> int:
        """Positions in the cache: all but the newest token."""
        return self.prompt_length + len(self.tokens) - 1


@dataclass(frozen=True)
class Size:
    """What of a sequence decides which programs it needs."""

    prompt: int
    full: int
    greedy: bool


class Engine:
    """Decoding of one model.

    trace: "experts" and "logits" are kept for every sequence.
    """

    def __init__(
        self,
        decoder: ServedDecoder,
        weights: Weights,
        programs: Programs,
        eos: tuple[int, ...],
        trace: frozenset[str] = frozenset(),
    ):
        self.decoder, self.weights, self.programs = decoder, weights, programs
        self.eos, self.trace = eos, trace
        self.most = decoder.config.max_positions

    # ---------------------------------------------------------------------------- running

    def check(self, prompt: int, sampling: Sampling) -> None:
        """Raises GenerationError, with the numbers, where prompt and answer do not fit."""
        if prompt + sampling.max_new_tokens > self.most:
            room = self.most - prompt
            advice = f"set max_new_tokens to at most {room}" if room > 0 else "shorten the prompt"
            raise GenerationError(
                f"the prompt takes {prompt} positions and max_new_tokens = "
                f"{sampling.max_new_tokens} more: {prompt + sampling.max_new_tokens} of the "
                f"{self.most} that this model has; {advice}"
            )

    def run(
        self,
        sequences: Iterable[Sequence],
        rows: int,
        steps: int = MOST_STEPS,
        greedy: bool = False,
    ) -> Iterator[list[Sequence]]:
        """Decode with up to `rows` sequences side by side; yields those that got new tokens, after
        every call of the decoding program. A sequence is done when its `stop` is set.

        sequences: read only as rows become free. greedy: the caller's word that none of them
        samples.
        """
        batch = Batch(self, self.round_rows(rows), greedy)
        source, waiting = iter(sequences), deque()
        while True:
            changed = []
            while free := batch.free():
                while len(waiting) < min(len(free), self.programs.rows):
                    following = next(source, None)
                    if following is None:
                        break
                    waiting.append(following)
                if not waiting:
                    break
                group = [waiting.popleft() for _ in range(min(len(waiting), len(free)))]
                batch.admit(group)
                changed += group
            if changed:
                yield changed
            if not batch.busy():
                return
            if not waiting:
                following = next(source, None)
                if following is not None:
                    waiting.append(following)
            yield batch.decode(steps, stop_early=bool(waiting))

    def round_rows(self, rows: int) -> int:
        """Rows of a batch: a power of two, times the data shards."""
        shards, size = self.programs.rows, 1
        while size * shards < rows:
            size *= 2
        return size * shards

    # --------------------------------------------------------------------------- programs

    def warm_up(self, sizes: Iterable[Size], rows: int) -> None:
        """Compile everything that sequences of these sizes need in a batch of `rows`."""
        sizes, rows = list(sizes), self.round_rows(rows)
        if not sizes:
            return
        greedy = all(size.greedy for size in sizes)
        # A group of prompts is padded to its longest; any sizes may meet.
        prompts = sorted({prompt_bucket(size.prompt, self.most) for size in sizes})
        rings = [ring_bucket(min(size.prompt for size in sizes) + 1, self.most)]
        while rings[-1] < ring_bucket(max(size.full for size in sizes), self.most):
            rings.append(ring_bucket(rings[-1] + 1, self.most))
        # With a row for each, all take their places before any of them grows.
        most = max(size.prompt for size in sizes) + 1 if len(sizes) <= rows else self.most
        for length in prompts:
            self.prefill_program(length)
        for number, slots in enumerate(rings):
            self.advance_program(rows, slots, greedy)
            for length in prompts:
                if length <= slots <= ring_bucket(most, self.most):
                    self.insert_program(rows, length, slots, greedy)
            if number:
                self.grow_program(rows, rings[number - 1], slots)

    def prefill_program(self, length: int) -> Any:
        """(weights, token_id_RT, modality_RT, slot_RT, soft_GSD, length_R) -> Step."""
        rows, width = self.programs.rows, self.decoder.config.hidden_size
        ids = np.empty((rows, length), np.int32)
        soft = np.empty((rows, length, width), self.decoder.dtype)
        specs = self.programs.batch_structs((ids, ids, ids, soft, np.empty(rows, np.int32)))
        layers = len(self.weights.layers)
        outputs = Step(self._by_row(2), (self._cache_sharding(),) * layers, self._replicated())
        return self.programs.get(
            f"prefill {length}", self.decoder.prefill, (self.weights, *specs), outputs=outputs
        )

    def insert_program(self, rows: int, length: int, slots: int, greedy: bool) -> Any:
        """See `states.insert`; the state is donated."""
        zero, real = np.int32(0), np.float32(0)
        new = Newcomer(zero, zero, zero, zero, real, real, zero, np.uint32(0))
        vocabulary = self.decoder.config.vocab_size
        inputs = (
            self.state_structs(rows, slots),
            self._cache_structs(self.programs.rows, length),
            self.programs.batch_structs(np.empty((self.programs.rows, vocabulary), np.float32)),
            self.programs.structs(new),
        )
        return self.programs.get(
            f"insert {length} into {rows} x {slots}{_how(greedy)}",
            partial(states.insert, self.eos, greedy),
            inputs,
            donate=(0,),
            outputs=(self._state_shardings(), self._replicated()),
        )

    def grow_program(self, rows: int, slots: int, longer: int) -> Any:
        """See `states.grow`."""
        return self.programs.get(
            f"grow {rows} x {slots} to {longer}",
            partial(states.grow, longer),
            (self.state_structs(rows, slots),),
            outputs=self._state_shardings(),
        )

    def advance_program(self, rows: int, slots: int, greedy: bool) -> Any:
        """See `states.advance`; the state is donated."""
        inputs = (
            self.weights,
            self.state_structs(rows, slots),
            *self.programs.structs((np.int32(0), np.bool_(False))),
        )
        return self.programs.get(
            f"decode {rows} x {slots}{_how(greedy)}",
            partial(states.advance, self.decoder, self.eos, greedy, MOST_STEPS, self.trace),
            inputs,
            donate=(1,),
            outputs=(self._state_shardings(), self._replicated()),
        )

    # -------------------------------------------------------------------------- placement

    def _by_row(self, rank: int) -> Any:
        return self.programs.sharding("batch", *[None] * (rank - 1))

    def _replicated(self) -> Any:
        return self.programs.sharding()

    def _cache_sharding(self) -> Any:
        return self.programs.sharding("batch", "kv_heads", None, None)

    def _state_shardings(self) -> State:
        layers = len(self.weights.layers)
        return State((self._cache_sharding(),) * layers, self._replicated(), self._by_row(1))

    def _cache_structs(self, rows: int, slots: int) -> tuple[KVCache, ...]:
        config, sharding = self.decoder.config, self._cache_sharding()
        lead, size = (rows, config.num_kv_heads), config.head_size
        shapes = KVCache((*lead, size, slots), (*lead, slots, size))
        return tuple(
            KVCache(
                *(jax.ShapeDtypeStruct(s, self.decoder.dtype, sharding=sharding) for s in shapes)
            )
            for _ in self.weights.layers
        )

    def state_structs(self, rows: int, slots: int) -> State:
        """Shapes and shardings of a state."""
        empty = jax.eval_shape(lambda: states.empty_rows(rows))
        cursor = self.programs.structs(np.int32(0))
        return State(self._cache_structs(rows, slots), cursor, self.programs.batch_structs(empty))

    def empty_state(self, rows: int, slots: int) -> State:
        """Rings of zeros, idle rows."""
        structs = self.state_structs(rows, slots)
        return jax.tree.map(
            lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), structs
        )


def _how(greedy: bool) -> str:
    return "" if greedy else ", sampling"


class Batch:
    """Rows of an engine and the sequences in them."""

    def __init__(self, engine: Engine, rows: int, greedy: bool):
        self.engine, self.rows, self.greedy = engine, rows, greedy
        self.held: list[Sequence | None] = [None] * rows
        self.state: State | None = None

    def free(self) -> list[int]:
        """Rows without a sequence."""
        return [row for row, sequence in enumerate(self.held) if sequence is None]

    def busy(self) -> bool:
        """Whether any row is decoding."""
        return any(sequence is not None for sequence in self.held)

    def admit(self, group: list[Sequence]) -> None:
        """Prefill some sequences, at most one per data shard, and give each a free row."""
        engine = self.engine
        rows, longest = engine.programs.rows, max(s.prompt_length for s in group)
        length = prompt_bucket(longest, engine.most)
        out = engine.prefill_program(length)(engine.weights, *self._inputs(group, rows, length))
        self._make_room(max(longest + 1, length))
        for source, (row, sequence) in enumerate(zip(self.free(), group, strict=False)):
            choice = sequence.sampling
            new = Newcomer(
                *map(np.int32, (row, source, sequence.prompt_length, choice.max_new_tokens)),
                *map(np.float32, (choice.temperature, choice.top_p)),
                np.int32(choice.top_k),
                np.uint32(choice.seed),
            )
            program = engine.insert_program(self.rows, length, self.slots, self.greedy)
            self.state, token = program(
                self.state, out.caches, out.logits_BV, engine.programs.put(new)
            )
            if "experts" in engine.trace:
                chosen = np.asarray(out.expert_LBTK)[:, source, : sequence.prompt_length]
                sequence.experts.append(chosen)
            if "logits" in engine.trace:
                sequence.logits.append(np.asarray(out.logits_BV)[source])
            self.held[row] = sequence
            self._append(row, int(token))

    def _inputs(self, group: list[Sequence], rows: int, length: int) -> Any:
        width, dtype = self.engine.decoder.config.hidden_size, self.engine.decoder.dtype
        token, modality = np.zeros((2, rows, length), np.int32)
        slot = np.full((rows, length), -1, np.int32)
        soft = np.zeros((rows, length, width), dtype)
        lengths = np.ones(rows, np.int32)
        for row, sequence in enumerate(group):
            used = slice(sequence.prompt_length)
            token[row, used] = sequence.token_id
            modality[row, used] = sequence.modality
            slot[row, used] = sequence.slot
            soft[row, : len(sequence.soft)] = sequence.soft
            lengths[row] = sequence.prompt_length
        return self.engine.programs.put_batch((token, modality, slot, soft, lengths))

    @property
    def slots(self) -> int:
        """S of the rings."""
        return self.state.caches[0].slots

    def _make_room(self, needed: int) -> None:
        """Rings that hold `needed` tokens of a row."""
        engine = self.engine
        slots = ring_bucket(needed, engine.most)
        if self.state is None:
            self.state = engine.empty_state(self.rows, slots)
        while self.slots < slots:
            longer = ring_bucket(self.slots + 1, engine.most)
            self.state = engine.grow_program(self.rows, self.slots, longer)(self.state)

    def decode(self, steps: int, stop_early: bool) -> list[Sequence]:
        """Up to `steps` tokens for every sequence; finished ones leave their rows."""
        engine = self.engine
        held = [(row, sequence) for row, sequence in enumerate(self.held) if sequence is not None]
        steps = min(steps, MOST_STEPS)
        self._make_room(max(min(s.cached + steps, s.full_length) for _, s in held))
        program = engine.advance_program(self.rows, self.slots, self.greedy)
        control = engine.programs.put((np.int32(steps), np.bool_(stop_early)))
        self.state, produced = program(engine.weights, self.state, *control)
        produced = jax.tree.map(np.asarray, produced)
        for row, sequence in held:
            count = int(np.sum(produced.token_NB[:, row] != states.NOTHING))
            if produced.expert_NLBK is not None:
                sequence.experts.append(np.swapaxes(produced.expert_NLBK[:count, :, row], 0, 1))
            if produced.logits_NBV is not None:
                sequence.logits += list(produced.logits_NBV[:count, row])
            for token in produced.token_NB[:count, row]:
                self._append(row, int(token))
        return [sequence for _, sequence in held]

    def _append(self, row: int, token: int) -> None:
        sequence = self.held[row]
        sequence.tokens.append(token)
        if token in self.engine.eos:
            sequence.stop = "eos"
        elif len(sequence.tokens) >= sequence.sampling.max_new_tokens:
            sequence.stop = "length"
        if sequence.stop:
            self.held[row] = None
