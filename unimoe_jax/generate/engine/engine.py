"""The loop of generation: prompts wait, are prefilled, take a row, are decoded, and free the row.

Tokens in, tokens out. The input is a `Sequence` of token ids and soft tokens, the output is the
list `tokens` of the same object. Text, files, requests and users are the business of the callers:
`generate.model` today. Several sequences are decoded side by side, and each enters and leaves the
batch independently of the others (continuous batching).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from unimoe_jax.generate.engine.active_batch import ActiveBatch
from unimoe_jax.generate.engine.buckets import (
    SMALLEST_PROMPT,
    next_group,
    prompt_bucket,
    ring_bucket,
    rows_together,
)
from unimoe_jax.generate.engine.decoding_programs import DecodingPrograms
from unimoe_jax.generate.engine.sequence import ProgramSize, Sequence
from unimoe_jax.generate.engine.settings import CheckedSampling
from unimoe_jax.generate.engine.state import MAX_STEPS
from unimoe_jax.generate.errors import GenerationError


class Engine:
    """Decodes sequences with the programs of one model.

    An engine holds no sequences between calls: every call of `run` makes a new batch. All calls
    share the compiled programs in `programs`.
    """

    def __init__(self, programs: DecodingPrograms):
        self.programs = programs

    def check_fits(self, prompt_length: int, sampling: CheckedSampling) -> None:
        """Check that the model has enough positions for a prompt and its longest answer.

        Raises:
            GenerationError: it has not; the message has the numbers.
        """
        limit, new_tokens = self.programs.max_length, sampling.max_new_tokens
        if prompt_length + new_tokens <= limit:
            return
        room = limit - prompt_length
        advice = f"set max_new_tokens to at most {room}" if room > 0 else "shorten the prompt"
        raise GenerationError(
            f"the prompt takes {prompt_length} positions and max_new_tokens = {new_tokens} more, "
            f"{prompt_length + new_tokens} together, but this model has {limit} positions; {advice}"
        )

    def run(
        self,
        sequences: Iterable[Sequence],
        rows: int,
        steps: int = MAX_STEPS,
        greedy: bool = False,
    ) -> Iterator[list[Sequence]]:
        """Decode all sequences, up to `rows` of them side by side.

        The iterator yields the sequences that got new tokens, after every group that was prefilled
        and after every call of the decoding program. A sequence is finished when its `stop` is
        set, which may happen with its first token.

        sequences: every prompt must pass `check_fits`. The iterable is read as rows become free,
            and one sequence ahead. Decoding pauses while the iterable makes the next sequence.
        rows: rounded up, see `DecodingPrograms.round_rows`.
        steps: tokens per sequence between two results, at most MAX_STEPS; 1 for streaming.
        greedy: the caller guarantees that no sequence samples.
        """
        programs = self.programs
        rows, shards = programs.round_rows(rows), programs.program_cache.data_shards
        batch = ActiveBatch(programs, rows, greedy)
        source, waiting = iter(sequences), deque[Sequence]()
        largest_group = rows_together(SMALLEST_PROMPT, rows, shards)
        while True:
            # Fill free rows, group by group, until no prompt waits or no row is free.
            while free := len(batch.free_rows()):
                # Read no more prompts than one group can take.
                missing = min(free, largest_group) - len(waiting)
                waiting.extend(islice(source, max(0, missing)))
                if not waiting:
                    break
                lengths = [s.prompt_length for s in waiting][:free]
                count, program_rows = next_group(lengths, rows, shards, programs.max_length)
                group = [waiting.popleft() for _ in range(count)]
                batch.admit(group, program_rows)
                yield group
            if not batch.is_busy():
                return
            # If another prompt waits, decode only until the first row becomes free.
            if not waiting:
                waiting.extend(islice(source, 1))
            yield batch.decode(steps, stop_early=bool(waiting))

    # --------------------------------------------------------------------- compiling before

    def warm_up(self, sizes: Iterable[ProgramSize], rows: int) -> None:
        """Compile every program that sequences of these sizes can need in a batch of `rows`.

        Afterwards `run` compiles nothing, if it gets the same `rows` and these sequences, and
        `greedy` exactly if all of them are greedy.
        """
        sizes, rows = list(sizes), self.programs.round_rows(rows)
        if not sizes:
            return
        greedy = all(size.greedy for size in sizes)
        groups = self._prefill_sizes(sizes, rows)
        for group in groups:
            self.programs.prefill_program(*group)
        # All rings that the sequences pass through while they grow.
        limit = self.programs.max_length
        rings = [ring_bucket(min(size.prompt_length for size in sizes) + 1, limit)]
        while rings[-1] < ring_bucket(max(size.full_length for size in sizes), limit):
            rings.append(ring_bucket(rings[-1] + 1, limit))
        # If there is a row for every sequence, all are inserted before any ring grows for answers.
        # Otherwise a later prompt may be inserted into a ring of any size.
        if len(sizes) <= rows:
            last_insert = ring_bucket(max(size.prompt_length for size in sizes) + 1, limit)
        else:
            last_insert = ring_bucket(limit, limit)
        for number, slots in enumerate(rings):
            self.programs.advance_program(rows, slots, greedy)
            for group in groups:
                # A ring is never shorter than the padded prompts that are copied into it.
                if group[1] <= slots <= last_insert:
                    self.programs.insert_program(group, rows, slots, greedy)
            if number:
                self.programs.grow_program(rows, rings[number - 1], slots)

    def _prefill_sizes(self, sizes: list[ProgramSize], rows: int) -> list[tuple[int, int]]:
        """(rows, length) of the prefill programs that `next_group` may choose for these sizes.

        A group is padded to its longest prompt, and prompts of any sizes may form a group.
        """
        limit, shards = self.programs.max_length, self.programs.program_cache.data_shards
        groups = []
        for length in sorted({prompt_bucket(size.prompt_length, limit) for size in sizes}):
            choices = {shards}
            # The larger program is only chosen if at least half of its rows are filled.
            largest = rows_together(length, rows, shards)
            if 2 * min(len(sizes), rows) >= largest:
                choices.add(largest)
            groups += [(program_rows, length) for program_rows in sorted(choices)]
        return groups
