"""Rows of an engine: sequences take them, are decoded side by side, and leave them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from unimoe_jax.generate.engine import state as states
from unimoe_jax.generate.engine.buckets import prompt_bucket, ring_bucket
from unimoe_jax.generate.engine.decoding_programs import DecodingPrograms
from unimoe_jax.generate.engine.sampling import Choice
from unimoe_jax.generate.engine.sequence import Sequence
from unimoe_jax.generate.engine.state import MOST_STEPS, Newcomers, State, no_newcomers


def newcomers(free: list[int], group: list[Sequence], rows: int) -> Newcomers:
    """Host arrays of `rows` entries; those behind the group mean nothing."""
    new = no_newcomers(rows)
    for source, (row, sequence) in enumerate(zip(free, group, strict=True)):
        own = sequence.sampling
        choice = Choice(own.temperature, own.top_p, own.top_k, own.seed)
        values = Newcomers(row, sequence.prompt_length, own.max_new_tokens, choice)
        for array, value in zip(jax.tree.leaves(new), jax.tree.leaves(values), strict=True):
            array[source] = value
    return new


class ActiveBatch:
    """Rows of an engine and the sequences in them."""

    def __init__(self, engine: DecodingPrograms, rows: int, greedy: bool):
        self.engine, self.rows, self.greedy = engine, rows, greedy
        self.held: list[Sequence | None] = [None] * rows
        self.state: State | None = None

    def free(self) -> list[int]:
        """Rows without a sequence."""
        return [row for row, sequence in enumerate(self.held) if sequence is None]

    def busy(self) -> bool:
        """Whether any row is decoding."""
        return any(sequence is not None for sequence in self.held)

    def admit(self, group: list[Sequence], rows: int) -> None:
        """Prefill some sequences, at most `rows`, and give each a free row."""
        engine, longest = self.engine, max(s.prompt_length for s in group)
        length = prompt_bucket(longest, engine.most)
        prefill = engine.prefill_program(rows, length)
        out = prefill(engine.weights, *self._inputs(group, rows, length))
        self._make_room(max(longest + 1, length))
        free = self.free()[: len(group)]
        insert = engine.insert_program((rows, length), self.rows, self.slots, self.greedy)
        new = engine.programs.put((newcomers(free, group, rows), np.int32(len(group))))
        self.state, token_R = insert(self.state, out.caches, out.logits_BV, *new)
        token_R = np.asarray(token_R)
        for source, (row, sequence) in enumerate(zip(free, group, strict=True)):
            if "experts" in engine.trace:
                chosen = np.asarray(out.expert_LBTK)[:, source, : sequence.prompt_length]
                sequence.experts.append(chosen)
            if "logits" in engine.trace:
                sequence.logits.append(np.asarray(out.logits_BV)[source])
            self.held[row] = sequence
            self._append(row, int(token_R[source]))

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
