"""Prompts in, tokens out: prefill, rows of a batch that come and go, decoding in steps.

The engine knows token ids and soft tokens, not text, files or programs of a command line. A
sequence waits, is prefilled, takes a free row, and leaves it when it is done; others go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from unimoe_jax.generation import state as states
from unimoe_jax.generation.batch import Batch, newcomers
from unimoe_jax.generation.errors import GenerationError
from unimoe_jax.generation.programs import (
    PROMPT,
    Programs,
    next_group,
    prompt_bucket,
    ring_bucket,
    rows_together,
)
from unimoe_jax.generation.request import Sampling
from unimoe_jax.generation.sequence import Sequence, Size
from unimoe_jax.generation.state import MOST_STEPS, State
from unimoe_jax.models.served import ServedDecoder, Step, Weights
from unimoe_jax.nn.decode_attention import KVCache


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
        rows, shards = self.round_rows(rows), self.programs.rows
        batch, source, waiting = Batch(self, rows, greedy), iter(sequences), deque()
        most = rows_together(PROMPT, rows, shards)
        while True:
            changed = []
            while free := batch.free():
                waiting.extend(islice(source, max(0, min(len(free), most) - len(waiting))))
                if not waiting:
                    break
                lengths = [s.prompt_length for s in waiting][: len(free)]
                count, together = next_group(lengths, rows, shards, self.most)
                group = [waiting.popleft() for _ in range(count)]
                batch.admit(group, together)
                changed += group
            if changed:
                yield changed
            if not batch.busy():
                return
            if not waiting:
                waiting.extend(islice(source, 1))
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
        groups = [
            (group, length)
            for length in prompts
            for group in sorted({self.programs.rows, self._together(length, rows, len(sizes))})
        ]
        for group in groups:
            self.prefill_program(*group)
        for number, slots in enumerate(rings):
            self.advance_program(rows, slots, greedy)
            for group in groups:
                if group[1] <= slots <= ring_bucket(most, self.most):
                    self.insert_program(group, rows, slots, greedy)
            if number:
                self.grow_program(rows, rings[number - 1], slots)

    def _together(self, length: int, rows: int, waiting: int) -> int:
        """Rows of the largest prefill program of a bucket that `waiting` sequences can need."""
        together = rows_together(length, rows, self.programs.rows)
        return together if 2 * min(waiting, rows) >= together else self.programs.rows

    def prefill_program(self, rows: int, length: int) -> Any:
        """(weights, token_id_RT, modality_RT, slot_RT, soft_GSD, length_R) -> Step."""
        width = self.decoder.config.hidden_size
        ids = np.empty((rows, length), np.int32)
        soft = np.empty((rows, length, width), self.decoder.dtype)
        specs = self.programs.batch_structs((ids, ids, ids, soft, np.empty(rows, np.int32)))
        layers = len(self.weights.layers)
        outputs = Step(self._by_row(2), (self._cache_sharding(),) * layers, self._replicated())
        return self.programs.get(
            f"prefill {rows} x {length}",
            self.decoder.prefill,
            (self.weights, *specs),
            outputs=outputs,
        )

    def insert_program(self, prompts: tuple[int, int], rows: int, slots: int, greedy: bool) -> Any:
        """See `states.insert`; prompts: rows and length of their program. The state is donated."""
        vocabulary = self.decoder.config.vocab_size
        inputs = (
            self.state_structs(rows, slots),
            self._cache_structs(*prompts),
            self.programs.batch_structs(np.empty((prompts[0], vocabulary), np.float32)),
            *self.programs.structs((newcomers([], [], prompts[0]), np.int32(0))),
        )
        return self.programs.get(
            f"insert {prompts[0]} x {prompts[1]} into {rows} x {slots}{_how(greedy)}",
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
