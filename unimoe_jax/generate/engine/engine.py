"""Prompts in, tokens out: prefill, rows of a batch that come and go, decoding in steps.

The engine knows token ids and soft tokens, not text, files or programs of a command line. A
sequence waits, is prefilled, takes a free row, and leaves it when it is done; others go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from unimoe_jax.generate.engine.active_batch import ActiveBatch
from unimoe_jax.generate.engine.buckets import (
    PROMPT,
    next_group,
    prompt_bucket,
    ring_bucket,
    rows_together,
)
from unimoe_jax.generate.engine.decoding_programs import DecodingPrograms
from unimoe_jax.generate.engine.sequence import ProgramSize, Sequence
from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.engine.state import MOST_STEPS
from unimoe_jax.generate.errors import GenerationError


class Engine(DecodingPrograms):
    """Decoding of one model: its programs, and the loop that fills and empties the rows."""

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
        every group that is prefilled and every call of the decoding program. A sequence is done
        when its `stop` is set; with its first token, it may be.

        sequences: read only as rows become free. greedy: the caller's word that none of them
        samples.
        """
        rows, shards = self.round_rows(rows), self.programs.rows
        batch, source, waiting = ActiveBatch(self, rows, greedy), iter(sequences), deque()
        most = rows_together(PROMPT, rows, shards)
        while True:
            while free := batch.free():
                waiting.extend(islice(source, max(0, min(len(free), most) - len(waiting))))
                if not waiting:
                    break
                lengths = [s.prompt_length for s in waiting][: len(free)]
                count, together = next_group(lengths, rows, shards, self.most)
                group = [waiting.popleft() for _ in range(count)]
                batch.admit(group, together)
                yield group
            if not batch.busy():
                return
            if not waiting:
                waiting.extend(islice(source, 1))
            yield batch.decode(steps, stop_early=bool(waiting))

    def warm_up(self, sizes: Iterable[ProgramSize], rows: int) -> None:
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
