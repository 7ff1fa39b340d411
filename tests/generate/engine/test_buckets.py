"""Sizes of programs: buckets, and which prompts are prefilled together."""

from __future__ import annotations

import pytest

from unimoe_jax.generate.engine.buckets import GROUP_POSITIONS, next_group, prompt_bucket, rows_together

MOST = 4096


@pytest.mark.parametrize(
    ("length", "rows", "shards", "together"),
    [
        (64, 32, 1, GROUP_POSITIONS // 64),
        (64, 4, 1, 4),
        (192, 32, 1, 4),
        (GROUP_POSITIONS, 32, 1, 1),
        (2 * GROUP_POSITIONS, 32, 1, 1),
        (GROUP_POSITIONS // 2, 32, 8, 16),
        (64, 8, 8, 8),
    ],
)
def test_a_group_has_so_many_positions_on_a_shard(length, rows, shards, together):
    assert rows_together(length, rows, shards) == together


@pytest.mark.parametrize(
    ("lengths", "rows", "group"),
    [
        ([50] * 32, 32, (16, 16)),
        ([50] * 8, 32, (8, 16)),
        # Less than half of a group would be more padding than prompts.
        ([50] * 7, 32, (1, 1)),
        ([50, 50], 2, (2, 2)),
        # What follows a long prompt waits for the next group; the order stays.
        ([1000, 50, 50], 32, (1, 1)),
        ([500, 500, 50, 50], 32, (2, 2)),
        ([50, 50, 50, 2000], 4, (3, 4)),
    ],
)
def test_the_next_group(lengths, rows, group):
    assert next_group(lengths, rows, 1, MOST) == group


def test_each_data_shard_takes_one_at_least():
    assert next_group([2000] * 5, 8, 4, MOST) == (4, 4)
    assert next_group([2000], 8, 4, MOST) == (1, 4)


def test_buckets_hold_their_prompts():
    for length in range(1, MOST + 1):
        bucket = prompt_bucket(length, MOST)
        assert length <= bucket <= max(64, 1.5 * length)
