"""The rows of a decoding batch: sequences enter them, are decoded side by side, and leave."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from unimoe_jax.generate.engine.buckets import prompt_bucket, ring_bucket
from unimoe_jax.generate.engine.decoding_programs import DecodingPrograms
from unimoe_jax.generate.engine.sequence import Sequence
from unimoe_jax.generate.engine.state import (
    MAX_STEPS,
    NO_TOKEN,
    NewRows,
    Produced,
    State,
    empty_new_rows,
)


def new_rows(free_rows: list[int], group: list[Sequence], program_rows: int) -> NewRows:
    """Host arrays [R] of a group that enters a batch, R = `program_rows` of its prefill program.

    free_rows: the row that each sequence takes. Entries behind the group are 0 and are not read.
    """
    new = empty_new_rows(program_rows)
    for source, (row, sequence) in enumerate(zip(free_rows, group, strict=True)):
        settings = sequence.sampling
        new.row_R[source] = row
        new.length_R[source] = sequence.prompt_length
        new.limit_R[source] = settings.max_new_tokens
        new.sampling.temperature_B[source] = settings.temperature
        new.sampling.top_p_B[source] = settings.top_p
        new.sampling.top_k_B[source] = settings.top_k
        new.sampling.seed_B[source] = settings.seed
    return new


class ActiveBatch:
    """A batch of `rows`, the sequences in them, and their state on the devices.

    programs: of the model. rows: as `DecodingPrograms.round_rows` gives. greedy: no sequence
    samples, so the programs need not sort.

    Attributes:
        sequences: the sequence of every row, None where a row is free.
    """

    def __init__(self, programs: DecodingPrograms, rows: int, greedy: bool):
        self.programs, self.rows, self.greedy = programs, rows, greedy
        self.sequences: list[Sequence | None] = [None] * rows
        self._state: State | None = None

    def free_rows(self) -> list[int]:
        """Rows without a sequence."""
        return [row for row, sequence in enumerate(self.sequences) if sequence is None]

    def is_busy(self) -> bool:
        """Whether any row is decoding."""
        return any(sequence is not None for sequence in self.sequences)

    # --------------------------------------------------------------------------- entering

    def admit(self, group: list[Sequence], program_rows: int) -> None:
        """Prefill some sequences together and give each a free row and its first token.

        program_rows: rows of the prefill program, at least as many as there are sequences. A
        sequence that is complete with its first token leaves its row at once.
        """
        programs, longest = self.programs, max(s.prompt_length for s in group)
        # Prefill all prompts, padded to the bucket of the longest.
        length = prompt_bucket(longest, programs.max_length)
        prefill = programs.prefill_program(program_rows, length)
        out = prefill(programs.weights, *self._prompt_arrays(group, program_rows, length))
        # Copy their caches into free rows of the ring and choose the first tokens.
        state = self._with_room(max(longest + 1, length))
        insert = programs.insert_program(
            (program_rows, length), self.rows, _slots(state), self.greedy
        )
        rows = self.free_rows()[: len(group)]
        new = new_rows(rows, group, program_rows)
        arguments = programs.program_cache.put((new, np.int32(len(group))))
        self._state, token_R = insert(state, out.caches, out.logits_BV, *arguments)
        token_R = np.asarray(token_R)
        # Record the results in the sequences.
        for source, (row, sequence) in enumerate(zip(rows, group, strict=True)):
            if "experts" in programs.trace:
                chosen = np.asarray(out.expert_LBTK)[:, source, : sequence.prompt_length]
                sequence.experts.append(chosen)
            if "logits" in programs.trace:
                sequence.logits.append(np.asarray(out.logits_BV)[source])
            self.sequences[row] = sequence
            self._append(row, sequence, int(token_R[source]))

    def _prompt_arrays(self, group: list[Sequence], rows: int, length: int) -> Any:
        """Inputs of the prefill program: prompts padded on the right, empty rows at the end."""
        decoder = self.programs.decoder
        token = np.zeros((rows, length), np.int32)
        modality = np.zeros((rows, length), np.int32)
        slot = np.full((rows, length), -1, np.int32)
        soft = np.zeros((rows, length, decoder.config.hidden_size), decoder.dtype)
        # An empty row has one position, because prefill reads the last position of every row.
        lengths = np.ones(rows, np.int32)
        for row, sequence in enumerate(group):
            used = slice(sequence.prompt_length)
            token[row, used] = sequence.token_id
            modality[row, used] = sequence.modality
            slot[row, used] = sequence.slot
            soft[row, : len(sequence.soft)] = sequence.soft
            lengths[row] = sequence.prompt_length
        return self.programs.program_cache.put_batch((token, modality, slot, soft, lengths))

    def _with_room(self, tokens: int) -> State:
        """The state with rings of at least `tokens` slots, made or grown if necessary.

        Rings grow from bucket to bucket, so that only growth by one bucket has to be compiled.
        """
        limit = self.programs.max_length
        needed = ring_bucket(tokens, limit)
        state = self._state or self.programs.empty_state(self.rows, needed)
        while (slots := _slots(state)) < needed:
            grow = self.programs.grow_program(self.rows, slots, ring_bucket(slots + 1, limit))
            # Replace the attribute as well, so that the smaller rings are freed.
            self._state = state = grow(state)
        return state

    # --------------------------------------------------------------------------- decoding

    def decode(self, steps: int, stop_early: bool) -> list[Sequence]:
        """Generate up to `steps` tokens for every sequence; finished sequences leave their rows.

        steps: at most MAX_STEPS are made. stop_early: return as soon as any sequence is finished.
        Returns all sequences that were decoded, the finished ones too.
        """
        programs, steps = self.programs, min(steps, MAX_STEPS)
        active = [(row, s) for row, s in enumerate(self.sequences) if s is not None]
        # The ring must hold the tokens of these steps, but no more than an answer may have.
        state = self._with_room(max(min(s.cached + steps, s.full_length) for _, s in active))
        advance = programs.advance_program(self.rows, _slots(state), self.greedy)
        arguments = programs.program_cache.put((np.int32(steps), np.bool_(stop_early)))
        self._state, produced = advance(programs.weights, state, *arguments)
        self._record(active, jax.tree.map(np.asarray, produced))
        return [sequence for _, sequence in active]

    def _record(self, active: list[tuple[int, Sequence]], produced: Produced) -> None:
        """Append the tokens and traces of one call to the sequences of these rows."""
        for row, sequence in active:
            # A row that finishes before the last step has NO_TOKEN in all later steps.
            count = int(np.sum(produced.token_NB[:, row] != NO_TOKEN))
            if produced.expert_NLBK is not None:
                sequence.experts.append(np.swapaxes(produced.expert_NLBK[:count, :, row], 0, 1))
            if produced.logits_NBV is not None:
                sequence.logits += list(produced.logits_NBV[:count, row])
            for token in produced.token_NB[:count, row]:
                self._append(row, sequence, int(token))

    def _append(self, row: int, sequence: Sequence, token: int) -> None:
        """Add a token to the sequence in `row`; if it is the last one, the row becomes free."""
        sequence.tokens.append(token)
        if token in self.programs.eos:
            sequence.stop = "eos"
        elif len(sequence.tokens) >= sequence.sampling.max_new_tokens:
            sequence.stop = "length"
        if sequence.stop:
            self.sequences[row] = None


def _slots(state: State) -> int:
    """S of the rings of all layers."""
    return state.caches[0].slots
