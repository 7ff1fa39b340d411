"""Sizes to which prompts and caches are padded, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

PROMPT, RING = 64, 256
TOGETHER = 1024


def prompt_bucket(length: int, most: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, … that holds a prompt; `most` ends the list."""
    power = PROMPT
    while power < length:
        power *= 2
    between = power * 3 // 4
    return min(between if power > PROMPT and between >= length else power, most)


def ring_bucket(tokens: int, most: int) -> int:
    """The smallest of 256, 1024, 4096, … that holds a sequence; `most` ends the list."""
    slots = RING
    while slots < tokens:
        slots *= 4
    return min(slots, most)


def rows_together(length: int, rows: int, shards: int) -> int:
    """How many prompts of a bucket are prefilled together for a batch of `rows`."""
    each = max(1, rows // shards)
    while each > 1 and each * length > TOGETHER:
        each //= 2
    return each * shards


def next_group(lengths: Sequence[int], rows: int, shards: int, most: int) -> tuple[int, int]:
    """How many of the waiting prompts to prefill next, in order, and the rows of their program:
    one per data shard, or as many as go together if they fill at least half of the rows."""
    count, together = 0, shards
    for number in range(1, len(lengths) + 1):
        fits = rows_together(prompt_bucket(max(lengths[:number]), most), rows, shards)
        if number > fits:
            break
        count, together = number, fits
    if 2 * count >= together:
        return count, together
    return min(count, shards), shards
