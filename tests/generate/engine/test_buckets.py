"""Buckets of sizes, and groups of prompts that are prefilled together."""

from __future__ import annotations

import pytest

from unimoe_jax.generate.engine.buckets import (
    GROUP_POSITIONS,
    next_group,
    prompt_bucket,
    ring_bucket,
    rows_together,
)

LIMIT = 4096


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
        (64, 32, 8, 32),
    ],
)
def test_positions_of_a_group_are_limited_per_shard(length, rows, shards, together):
    assert rows_together(length, rows, shards) == together


@pytest.mark.parametrize(
    ("lengths", "rows", "group"),
    [
        ([50] * 32, 32, (16, 16)),
        ([50] * 8, 32, (8, 16)),
        # Seven prompts would fill less than half of a group of 16.
        ([50] * 7, 32, (1, 1)),
        ([50, 50], 2, (2, 2)),
        # A long prompt is prefilled alone, and the short ones behind it wait: the order stays.
        ([1000, 50, 50], 32, (1, 1)),
        ([500, 500, 50, 50], 32, (2, 2)),
        ([50, 50, 50, 2000], 4, (3, 4)),
    ],
)
def test_the_next_group(lengths, rows, group):
    assert next_group(lengths, rows, 1, LIMIT) == group


def test_a_group_has_a_row_on_every_data_shard():
    assert next_group([2000] * 5, 8, 4, LIMIT) == (4, 4)
    assert next_group([2000], 8, 4, LIMIT) == (1, 4)


def test_buckets_hold_their_prompts():
    for length in range(1, LIMIT + 1):
        bucket = prompt_bucket(length, LIMIT)
        assert length <= bucket <= max(64, 1.5 * length)


def test_the_examples_of_the_docstrings():
    lengths = (50, 65, 97, 130, 200)
    assert [prompt_bucket(length, LIMIT) for length in lengths] == [64, 96, 128, 192, 256]
    assert prompt_bucket(65, 80) == 80
    assert [ring_bucket(tokens, LIMIT) for tokens in (65, 257, 1025)] == [256, 1024, 4096]
    assert ring_bucket(1025, 2048) == 2048
