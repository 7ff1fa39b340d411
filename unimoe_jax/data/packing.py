"""Samples into rows, rows into batches, rows of a batch onto shards. Pure functions of integers.

Rows are filled in the given order and closed by an exact pair; samples without media fill what rows
with media leave. Batches and shards are dealt rows of like media in turn, so that every batch and
every shard receives its share of each pool.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

import numpy as np


class _Pool:
    """The samples not yet packed: by size, and in their given order."""

    def __init__(self, tokens: np.ndarray, entries: np.ndarray, length: int):
        self.sizes = tokens.tolist()
        self.entries = entries.tolist()
        self.counts = np.bincount(tokens, minlength=length + 1)
        self.distinct = np.flatnonzero(self.counts).tolist()
        self.of_size: dict[int, dict[int, None]] = {}
        for sample, size in enumerate(self.sizes):
            self.of_size.setdefault(size, {})[sample] = None
        self.total, self.left = sum(self.sizes), len(self.sizes)
        self._next = 0

    def first(self) -> int:
        """The first sample left, in the given order."""
        while self._next not in self.of_size[self.sizes[self._next]]:
            self._next += 1
        return self._next

    def nearest(self, target: float, most: int) -> int:
        """A sample of the size nearest to `target` that is at most `most`."""
        at = min(bisect_left(self.distinct, target), len(self.distinct) - 1)
        below = at and target - self.distinct[at - 1] < self.distinct[at] - target
        if at and (below or self.distinct[at] > most):
            at -= 1
        return self.any(self.distinct[at])

    def any(self, size: int) -> int:
        return next(reversed(self.of_size[size]))

    def pair(self, room: int) -> tuple[int, int]:
        """Sizes of the two samples (larger first) whose sum comes nearest to `room` from below.

        There must be two samples that fit. Among equal sums the most alike are taken, which leaves
        the tails of the size distribution for rows that need them.
        """
        sizes = np.flatnonzero(self.counts[: room - self.distinct[0] + 1])
        other = sizes[np.maximum(np.searchsorted(sizes, room - sizes, "right") - 1, 0)]
        fits = (sizes + other <= room) & ((other != sizes) | (self.counts[sizes] > 1))
        score = np.where(fits, (sizes + other) * len(self.counts) - np.abs(sizes - other), -1)
        best = int(np.argmax(score))
        first, second = int(sizes[best]), int(other[best])
        if score[best] < 0:  # only one sample is left that fits
            return first, 0
        return max(first, second), min(first, second)

    def remove(self, sample: int) -> None:
        size = self.sizes[sample]
        del self.of_size[size][sample]
        self.counts[size] -= 1
        self.total -= size
        self.left -= 1
        if not self.counts[size]:
            del self.distinct[bisect_left(self.distinct, size)]


class _Row:
    """A row being filled; `take` refuses a sample whose media exceed the limit."""

    def __init__(self, pool: _Pool, length: int, limit: list[int]):
        self.pool, self.room, self.limit = pool, length, limit
        self.members: list[int] = []
        self.used = [0] * len(limit)

    def take(self, sample: int) -> bool:
        used = [a + b for a, b in zip(self.used, self.pool.entries[sample], strict=True)]
        if any(a > b for a, b in zip(used, self.limit, strict=True)):
            return False
        self.used = used
        self.members.append(sample)
        self.room -= self.pool.sizes[sample]
        self.pool.remove(sample)
        return True

    def fill(self) -> None:
        """Fill up: samples in order while there is room for several, then an exact pair."""
        pool = self.pool
        while pool.left and self.room >= pool.distinct[0]:
            least = pool.distinct[0]
            number = max(1, min(round(self.room * pool.left / pool.total), self.room // least))
            if number == 1:
                size = pool.distinct[bisect_right(pool.distinct, self.room) - 1]
                went_well = self.take(pool.any(size))
            elif number == 2:
                large, small = pool.pair(self.room)
                went_well = self.take(pool.any(large))
                if went_well and small:
                    went_well = self.take(pool.any(small))
            else:
                sample = pool.first()
                if pool.sizes[sample] + (number - 1) * least > self.room:
                    sample = pool.nearest(self.room / number, self.room)
                went_well = self.take(sample)
            if not went_well:
                return


def fill_rows(
    tokens: np.ndarray, entries: np.ndarray, length: int, limit: np.ndarray
) -> list[list[int]]:
    """Pack samples into rows: int [n] tokens (at most `length`) -> the samples of each row.

    entries int [n, M] pool entries per medium; limit int [M] most entries per row, never below a
    single sample's. A row takes samples in their given (shuffled) order until about two more fit,
    which are then chosen so that their sum fills it. Taking the first ones blindly keeps the
    sizes that remain representative, so that the last rows fill as well as the first.
    """
    pool = _Pool(tokens, entries, length)
    rows = []
    while pool.left:
        row = _Row(pool, length, limit.tolist())
        largest = pool.distinct[-1]
        row.take(pool.any(largest) if largest > length // 2 else pool.first())
        row.fill()
        rows.append(row.members)
    return rows


def fill_ends(tokens: np.ndarray, room: np.ndarray) -> list[list[int]]:
    """Add samples without media to packed rows: int [n] tokens, int [rows] positions left in each
    row -> the samples that each row receives. A sample may fit nowhere.

    The ends are filled as `fill_rows` fills rows, from samples in their given order where several
    fit, so that those which remain still pack well by themselves.
    """
    none = np.zeros((len(tokens), 0), np.int64)
    pool = _Pool(tokens, none, int(room.max(initial=0)))
    added = []
    for left in room.tolist():
        row = _Row(pool, left, [])
        row.fill()
        added.append(row.members)
    return added


def row_limit(tokens: np.ndarray, entries: np.ndarray, length: int) -> np.ndarray:
    """Most pool entries per row, int [M]: the smallest multiple of the mean that packs well.

    "Well" is at most half a percent more padding than without a limit, judged on a sample of the
    data. Small limits keep the pools of a shard, and so the encoders' work, even.
    """
    need = entries.max(axis=0, initial=0)
    if len(tokens) > 20_000:
        chosen = np.linspace(0, len(tokens) - 1, 20_000).astype(np.int64)
        tokens, entries = tokens[chosen], entries[chosen]
    free = np.full(entries.shape[1], np.iinfo(np.int32).max)
    allowed = len(fill_rows(tokens, entries, length, free)) * 1.005
    mean = length * entries.sum(axis=0) / max(tokens.sum(), 1)
    for factor in (1.1, 1.25, 1.5, 2.0, 3.0, 4.0):
        limit = np.maximum(need, np.ceil(factor * mean).astype(np.int64))
        if len(fill_rows(tokens, entries, length, limit)) <= allowed:
            return limit
    return free


def deal(load: np.ndarray, bins: int) -> np.ndarray:
    """Deal rows to bins in serpentine order of their load: int [bins, ceil(n / bins)], -1 empty.

    load int [n, M]. Rows of equal load keep their order and are spread evenly; bins differ by at
    most one in the number of rows.
    """
    size = load.sum(axis=1)
    order = np.lexsort((*(-column for column in load.T), -size))
    depth = -(-len(load) // bins)
    dealt = np.full(depth * bins, -1, np.int64)
    dealt[: len(load)] = order
    table = dealt.reshape(depth, bins)
    table[1::2] = table[1::2, ::-1]
    return np.ascontiguousarray(table.T)


def arrange(
    load: np.ndarray, rows: int, shards: int, capacity: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Place packed rows: (batches int [NB, rows] with -1 for empty rows, peak int [M]).

    load int [n, M] pool entries per row. Rows [g*R, (g+1)*R) of a batch belong to shard g. Which
    rows form a batch does not depend on `shards` unless some shard would exceed `capacity`; rows
    that do not fit there move to where there is room, or into batches of their own at the end.
    peak is the largest load of any shard before such moves. capacity None: no limit.
    """
    if not len(load):
        return np.zeros((0, rows), np.int64), np.zeros(load.shape[1], np.int64)
    per_shard = rows // shards
    padded = np.concatenate([load, np.zeros((1, load.shape[1]), load.dtype)])
    table = deal(load, -(-len(load) // rows))
    places = np.full((len(table), shards, per_shard), -1, np.int64)
    for batch, members in zip(places, table, strict=True):
        members = members[members >= 0]
        dealt = deal(load[members], shards)
        batch[:, : dealt.shape[1]] = np.where(dealt < 0, -1, members[dealt])
    loads = padded[places].sum(axis=2)
    peak = loads.max(axis=(0, 1))
    if capacity is not None and (peak > capacity).any():
        places = _relieve(places, padded, loads, capacity)
    return places.reshape(len(places), rows), peak


def _relieve(places, padded, loads, capacity) -> np.ndarray:
    """Move rows out of shards beyond capacity into free places."""
    homeless = []
    for batch, shard in np.argwhere((loads > capacity).any(axis=2)):
        for slot in np.argsort(padded[places[batch, shard]].sum(axis=1), kind="stable"):
            if (loads[batch, shard] <= capacity).all():
                break
            row = places[batch, shard, slot]
            if row >= 0 and (padded[row] * (loads[batch, shard] > capacity)).any():
                homeless.append(row)
                places[batch, shard, slot] = -1
                loads[batch, shard] -= padded[row]
    for row in homeless:
        free = (places < 0).any(axis=2) & (loads + padded[row] <= capacity).all(axis=2)
        if not free.any():
            places = np.concatenate([places, np.full_like(places[:1], -1)])
            loads = np.concatenate([loads, np.zeros_like(loads[:1])])
            batch, shard = len(places) - 1, 0
        else:
            batch, shard = np.argwhere(free)[-1]
        slot = int(np.argmax(places[batch, shard] < 0))
        places[batch, shard, slot] = row
        loads[batch, shard] += padded[row]
    return places


def epoch_slice(number: int, weight: float, epoch: int) -> tuple[int, int]:
    """Positions [a, b) of the endless row of permutations that `epoch` reads of a source.

    Rounded up, so that the first epoch is never empty; the slack absorbs float error.
    """
    start, end = (math.ceil(at * weight * number - 1e-9) for at in (epoch, epoch + 1))
    return start, end
