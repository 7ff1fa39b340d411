"""The examples in the docstrings of the packing functions."""

from __future__ import annotations

import numpy as np
import pytest

from unimoe_jax.data.packing import arrange, deal, epoch_slice, fill_ends, fill_rows, row_limit


def column(*values: int) -> np.ndarray:
    """The loads of rows, or the entries of samples, with one medium: int [n, 1]."""
    return np.array(values)[:, None]


def test_rows_are_filled_exactly():
    no_media = np.zeros((7, 0), int)
    rows = fill_rows(np.array([3, 2, 5, 3, 4, 1, 2]), no_media, 10, np.zeros(0, int))
    assert rows == [[0, 4, 3], [1, 2, 6, 5]]


def test_ends_of_rows_receive_samples_that_fit():
    assert fill_ends(np.array([4, 1, 3, 6]), np.array([2, 7])) == [[1], [0, 2]]


def test_the_limit_is_the_smallest_that_packs_as_well_as_no_limit():
    assert row_limit(np.array([5, 5, 5, 5]), column(2, 0, 1, 1), 10).tolist() == [3]


def test_rows_are_dealt_forth_and_back():
    assert deal(column(5, 1, 3, 2, 4), 2).tolist() == [[0, 3, 1], [4, 2, -1]]


@pytest.mark.parametrize(
    ("capacity", "batches"),
    [(None, [[0, 3, 1, 2]]), (4, [[0, 3, 1, 2]]), (3, [[0, 3, 1, -1], [2, -1, -1, -1]])],
)
def test_rows_beyond_the_capacity_of_a_shard_move(capacity, batches):
    limit = None if capacity is None else np.array([capacity])
    places, peak = arrange(column(3, 3, 1, 0), rows=4, shards=2, capacity=limit)
    assert places.tolist() == batches
    assert peak.tolist() == [4]


def test_an_epoch_reads_its_part_of_a_source():
    slices = [epoch_slice(10, 0.25, epoch) for epoch in range(4)]
    assert slices == [(0, 3), (3, 5), (5, 8), (8, 10)]
