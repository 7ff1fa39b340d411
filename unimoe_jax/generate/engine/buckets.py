"""Sizes are rounded up to a few buckets, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

SMALLEST_PROMPT, SMALLEST_RING = 64, 256
GROUP_POSITIONS = 1024
"""Positions that prompts prefilled together may take on one data shard. A longer prompt is
prefilled alone."""


def prompt_bucket(length: int, limit: int) -> int:
    """Positions to which a prompt is padded: the next of 64, 96, 128, 192, 256, …

    No bucket is above `limit`, the number of positions that the model has. Examples with a limit of
    4096: 50 -> 64, 65 -> 96, 97 -> 128, 130 -> 192, 200 -> 256; with a limit of 80: 65 -> 80.
    """
    power = SMALLEST_PROMPT
    while power < length:
        power *= 2
    # Between two powers of two there is one more bucket, so that at most a third is padding.
    between = power * 3 // 4
    bucket = between if power > SMALLEST_PROMPT and between >= length else power
    return min(bucket, limit)


def ring_bucket(tokens: int, limit: int) -> int:
    """Slots of a cache that holds `tokens` positions: the next of 256, 1024, 4096, …

    No bucket is above `limit`. Examples with a limit of 4096: 65 -> 256, 257 -> 1024,
    1025 -> 4096; with a limit of 2048: 1025 -> 2048.
    """
    slots = SMALLEST_RING
    while slots < tokens:
        slots *= 4
    return min(slots, limit)


def rows_together(length: int, rows: int, shards: int) -> int:
    """How many prompts of a bucket the largest prefill program for a batch of `rows` takes.

    Every data shard takes the same number, at most GROUP_POSITIONS / length. Examples with 32 rows
    on one shard: length 64 -> 16 prompts, 192 -> 4, 2048 -> 1; length 64 on 8 shards -> 32.
    """
    per_shard = max(1, rows // shards)
    while per_shard > 1 and per_shard * length > GROUP_POSITIONS:
        per_shard //= 2
    return per_shard * shards


def next_group(lengths: Sequence[int], rows: int, shards: int, limit: int) -> tuple[int, int]:
    """(how many of the waiting prompts to prefill next, rows of the program that does it).

    lengths: positions of the waiting prompts, which keep their order. A group is as large as
    `rows_together` allows. If it fills less than half of the program's rows, one prompt per data
    shard is prefilled instead, because the rest would be padding. Examples with 32 rows on one
    shard: 8 prompts of 50 positions -> (8, 16); 7 of them -> (1, 1); [1000, 50] -> (1, 1).
    """
    count, program_rows = 0, shards
    for number in range(1, len(lengths) + 1):
        # One more prompt may be longer, and then fewer fit.
        fitting = rows_together(prompt_bucket(max(lengths[:number]), limit), rows, shards)
        if number > fitting:
            break
        count, program_rows = number, fitting
    if 2 * count >= program_rows:
        return count, program_rows
    return min(count, shards), shards
