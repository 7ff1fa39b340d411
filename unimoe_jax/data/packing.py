"""Samples -> rows, rows -> batches, rows of a batch -> shards. Pure functions of integers.

Rows are filled by best-fit packing: a row takes samples in their given order until about two more
fit, and then the two whose sum fills it best. Samples without media fill the ends that rows with
media leave free. Rows are dealt to batches, and the rows of a batch to shards, like cards from a
pile sorted by media, so that every batch and every shard receives its share of each pool.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

import numpy as np

# ------------------------------------------------------------------------- samples into rows


class _Unpacked:
    """The samples that are in no row yet: by size, and in their given order."""

    def __init__(self, tokens: np.ndarray, entries: np.ndarray, length: int):
        self.sizes = tokens.tolist()
        self.entries = entries.tolist()
        # counts[s]: samples of size s; distinct: the sizes that occur, ascending.
        self.counts = np.bincount(tokens, minlength=length + 1)
        self.distinct = np.flatnonzero(self.counts).tolist()
        # A dict keeps the samples of a size in order, and removes any of them in constant time.
        self.by_size: dict[int, dict[int, None]] = {}
        for sample, size in enumerate(self.sizes):
            self.by_size.setdefault(size, {})[sample] = None
        self.total, self.number = sum(self.sizes), len(self.sizes)
        self._next = 0

    def first(self) -> int:
        """The first unpacked sample, in the given order."""
        while self._next not in self.by_size[self.sizes[self._next]]:
            self._next += 1
        return self._next

    def nearest(self, target: float, limit: int) -> int:
        """A sample whose size is nearest to `target` and at most `limit`.

        Example: among the sizes 3, 5 and 9, the target 6.5 finds 5, and so does the target 8 with
        the limit 8.
        """
        index = min(bisect_left(self.distinct, target), len(self.distinct) - 1)
        if index:
            gap_below = target - self.distinct[index - 1]
            gap_above = self.distinct[index] - target
            if gap_below < gap_above or self.distinct[index] > limit:
                index -= 1
        return self.of_size(self.distinct[index])

    def of_size(self, size: int) -> int:
        """The last unpacked sample of this size."""
        return next(reversed(self.by_size[size]))

    def pair(self, room: int) -> tuple[int, int]:
        """Sizes of the two samples (larger first) whose sum comes nearest to `room` from below.

        Twice the smallest size must be at most `room`. If no two samples fit, the second size is 0.
        Among pairs of equal sum, the pair of most similar sizes is taken, which leaves very small
        and very large samples for rows that need them.

        Example: for a room of 10, sizes 3, 4, 5 and 7 give (7, 3), which fills it. Sizes 2, 4, 6
        and 8 give (6, 4) rather than (8, 2).
        """
        # The best partner of a size is the largest size that fits beside it.
        sizes = np.flatnonzero(self.counts[: room - self.distinct[0] + 1])
        partner = sizes[np.maximum(np.searchsorted(sizes, room - sizes, "right") - 1, 0)]
        # A size can be its own partner only if it occurs twice.
        fits = (sizes + partner <= room) & ((partner != sizes) | (self.counts[sizes] > 1))
        # Compare the sums first and the differences second; a difference is below len(counts).
        score = (sizes + partner) * len(self.counts) - np.abs(sizes - partner)
        score = np.where(fits, score, -1)
        best = int(np.argmax(score))
        size, partner_size = int(sizes[best]), int(partner[best])
        if score[best] < 0:  # no second sample fits beside the smallest
            return size, 0
        return max(size, partner_size), min(size, partner_size)

    def remove(self, sample: int) -> None:
        """Remove a sample that has been put into a row."""
        size = self.sizes[sample]
        del self.by_size[size][sample]
        self.counts[size] -= 1
        self.total -= size
        self.number -= 1
        if not self.counts[size]:
            del self.distinct[bisect_left(self.distinct, size)]


class _Row:
    """A row that is being filled; `take` refuses a sample if the row's media would exceed `limit`.

    room: free positions; members: samples so far; used: pool entries so far, by medium.
    """

    def __init__(self, unpacked: _Unpacked, length: int, limit: list[int]):
        self.unpacked, self.room, self.limit = unpacked, length, limit
        self.members: list[int] = []
        self.used = [0] * len(limit)

    def take(self, sample: int) -> bool:
        """Put a sample into the row; False if its media would exceed the limit."""
        used = [a + b for a, b in zip(self.used, self.unpacked.entries[sample], strict=True)]
        if any(a > b for a, b in zip(used, self.limit, strict=True)):
            return False
        self.used = used
        self.members.append(sample)
        self.room -= self.unpacked.sizes[sample]
        self.unpacked.remove(sample)
        return True

    def fill(self) -> None:
        """Fill the row: samples in order while there is room for several, then a pair whose sum
        fills it. The row is finished as soon as `take` refuses a sample."""
        unpacked = self.unpacked
        while unpacked.number and self.room >= unpacked.distinct[0]:
            smallest = unpacked.distinct[0]
            # Estimate from the mean size how many more samples fit; at least 1, and at most as
            # many as fit of the smallest size.
            estimate = round(self.room * unpacked.number / unpacked.total)
            expected = max(1, min(estimate, self.room // smallest))
            if expected == 1:
                # The largest sample that fits.
                size = unpacked.distinct[bisect_right(unpacked.distinct, self.room) - 1]
                taken = self.take(unpacked.of_size(size))
            elif expected == 2:
                large, small = unpacked.pair(self.room)
                taken = self.take(unpacked.of_size(large))
                if taken and small:
                    taken = self.take(unpacked.of_size(small))
            else:
                # The next sample in order. If it leaves too little room for the others that are
                # expected, take one of about the mean size instead.
                sample = unpacked.first()
                if unpacked.sizes[sample] + (expected - 1) * smallest > self.room:
                    sample = unpacked.nearest(self.room / expected, self.room)
                taken = self.take(sample)
            if not taken:
                return


def fill_rows(
    tokens: np.ndarray, entries: np.ndarray, length: int, limit: np.ndarray
) -> list[list[int]]:
    """Pack samples into rows: int [n] tokens (at most `length`) -> the samples of each row.

    entries int [n, M] pool entries per medium; limit int [M] largest number of entries per row, not
    below those of any single sample. A row takes samples in their given (shuffled) order until
    about two more fit, which are then chosen so that their sum fills it. Because the first samples
    are taken whatever their size, the sizes that remain stay representative, so the last rows fill
    as well as the first.

    Example: samples of 3, 2, 5, 3, 4, 1 and 2 tokens without media, in rows of 10, are packed into
    the rows [0, 4, 3] (3 + 4 + 3 = 10 tokens) and [1, 2, 6, 5] (2 + 5 + 2 + 1 = 10 tokens).
    """
    unpacked = _Unpacked(tokens, entries, length)
    rows = []
    while unpacked.number:
        row = _Row(unpacked, length, limit.tolist())
        # A sample of more than half a row can never be one of several, so place it first.
        largest = unpacked.distinct[-1]
        row.take(unpacked.of_size(largest) if largest > length // 2 else unpacked.first())
        row.fill()
        rows.append(row.members)
    return rows


def fill_ends(tokens: np.ndarray, room: np.ndarray) -> list[list[int]]:
    """Add samples without media to packed rows: int [n] tokens, int [rows] free positions of each
    row -> the samples that each row receives. A sample may fit nowhere.

    The ends are filled as `fill_rows` fills rows: where several samples fit, they are taken in
    their given order, so that the samples that remain still pack well by themselves.

    Example: for tokens [4, 1, 3, 6] and rows with 2 and 7 free positions, the rows receive the
    samples [1] and [0, 2]. The sample of 6 tokens fits nowhere any more.
    """
    no_entries = np.zeros((len(tokens), 0), np.int64)
    unpacked = _Unpacked(tokens, no_entries, int(room.max(initial=0)))
    added = []
    for free in room.tolist():
        row = _Row(unpacked, free, [])
        row.fill()
        added.append(row.members)
    return added


def row_limit(tokens: np.ndarray, entries: np.ndarray, length: int) -> np.ndarray:
    """Largest number of pool entries per row, int [M]: the smallest multiple of the mean that packs
    well.

    "Well" means at most half a percent more rows than without a limit, measured on a part of the
    data. Small limits keep the pools of the shards, and so the work of the encoders, even.

    Example: four samples of 5 tokens with 2, 0, 1 and 1 images, in rows of 10, are 2 images per row
    in the mean. 1.1 times 2 is rounded up to 3. With at most 3 images per row the samples take 2
    rows, as many as without a limit, so the limit is 3.
    """
    # The limit must admit every single sample, also those that are not measured below.
    need = entries.max(axis=0, initial=0)
    if len(tokens) > 20_000:
        chosen = np.linspace(0, len(tokens) - 1, 20_000).astype(np.int64)
        tokens, entries = tokens[chosen], entries[chosen]
    unlimited = np.full(entries.shape[1], np.iinfo(np.int32).max)
    allowed_rows = len(fill_rows(tokens, entries, length, unlimited)) * 1.005
    # Entries of a full row, if media were spread evenly over all positions.
    mean = length * entries.sum(axis=0) / max(tokens.sum(), 1)
    for factor in (1.1, 1.25, 1.5, 2.0, 3.0, 4.0):
        limit = np.maximum(need, np.ceil(factor * mean).astype(np.int64))
        if len(fill_rows(tokens, entries, length, limit)) <= allowed_rows:
            return limit
    return unlimited


# ----------------------------------------------------------------- rows into batches and shards


def deal(load: np.ndarray, bins: int) -> np.ndarray:
    """Deal rows to bins in serpentine order of their load: int [bins, ceil(n / bins)], -1 empty.

    load int [n, M] pool entries per row. Rows of equal load keep their order and are spread evenly;
    the numbers of rows in any two bins differ by at most one.

    Example: five rows of loads 5, 1, 3, 2, 4 are sorted to the rows 0, 4, 2, 3, 1 and dealt to two
    bins forth and back: 0 4, then 3 2, then 1. The bins are [0, 3, 1] and [4, 2, -1] with loads of
    5 + 2 + 1 = 8 and 4 + 3 = 7.
    """
    # Sort by the total load, and rows of equal total by their single media.
    total = load.sum(axis=1)
    order = np.lexsort((*(-column for column in load.T), -total))
    depth = -(-len(load) // bins)
    dealt = np.full(depth * bins, -1, np.int64)
    dealt[: len(load)] = order
    # Every line of the table gives one row to each bin; every second line runs backwards.
    table = dealt.reshape(depth, bins)
    table[1::2] = table[1::2, ::-1]
    return np.ascontiguousarray(table.T)


def arrange(
    load: np.ndarray, rows: int, shards: int, capacity: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Place packed rows: (batches int [NB, rows] with -1 for empty rows, peak int [M]).

    load int [n, M] pool entries per row; capacity int [M] pool entries per shard, None for no
    limit. Rows [g*R, (g+1)*R) of a batch belong to shard g. The rows of a batch do not depend on
    `shards` unless some shard would exceed `capacity`; rows that do not fit there move to another
    shard with room, or into additional batches at the end. peak is the largest load of any shard
    before such moves.

    Example: rows of loads 3, 3, 1 and 0 in batches of 4 rows over 2 shards give the batch
    [0, 3, 1, 2] and the peak 4, in the second shard. With a capacity of 3, row 2 moves into an
    additional batch: [0, 3, 1, -1] and [2, -1, -1, -1].
    """
    if not len(load):
        return np.zeros((0, rows), np.int64), np.zeros(load.shape[1], np.int64)
    rows_per_shard = rows // shards
    # Deal all rows to batches, then the rows of each batch to its shards.
    dealt = deal(load, -(-len(load) // rows))
    places = np.full((len(dealt), shards, rows_per_shard), -1, np.int64)
    for batch_places, members in zip(places, dealt, strict=True):
        members = members[members >= 0]
        by_shard = deal(load[members], shards)
        batch_places[:, : by_shard.shape[1]] = np.where(by_shard < 0, -1, members[by_shard])
    # An empty place is row -1, which is a row without load at the end.
    padded_load = np.concatenate([load, np.zeros((1, load.shape[1]), load.dtype)])
    shard_load = padded_load[places].sum(axis=2)
    peak = shard_load.max(axis=(0, 1))
    if capacity is not None and (peak > capacity).any():
        places = _relieve(places, padded_load, shard_load, capacity)
    return places.reshape(len(places), rows), peak


def _relieve(
    places: np.ndarray, row_load: np.ndarray, shard_load: np.ndarray, capacity: np.ndarray
) -> np.ndarray:
    """Move rows out of shards beyond capacity into free places; returns the new places.

    places int [NB, shards, rows per shard] rows, -1 empty; row_load int [n + 1, M], the last row
    is the empty one; shard_load int [NB, shards, M] and `places` are changed in place.

    Example: capacity 3 and places [[[0, 3], [1, 2]]] with row loads 3, 3, 1, 0. The second shard
    holds 3 + 1 = 4 entries, so its lightest row, 2, has to move. The first shard has no free place,
    so a batch is added: [[[0, 3], [1, -1]], [[2, -1], [-1, -1]]].
    """
    # From every shard beyond capacity, remove the lightest rows that hold an exceeded medium, until
    # the rest is within capacity.
    homeless = []
    for batch, shard in np.argwhere((shard_load > capacity).any(axis=2)):
        for slot in np.argsort(row_load[places[batch, shard]].sum(axis=1), kind="stable"):
            exceeded = shard_load[batch, shard] > capacity
            if not exceeded.any():
                break
            row = places[batch, shard, slot]
            if row >= 0 and (row_load[row] * exceeded).any():
                homeless.append(row)
                places[batch, shard, slot] = -1
                shard_load[batch, shard] -= row_load[row]
    # Put each of these rows into the last shard that has a free place and enough capacity.
    for row in homeless:
        free = (places < 0).any(axis=2) & (shard_load + row_load[row] <= capacity).all(axis=2)
        if free.any():
            batch, shard = np.argwhere(free)[-1]
        else:
            # No shard can take the row, so add an empty batch.
            places = np.concatenate([places, np.full_like(places[:1], -1)])
            shard_load = np.concatenate([shard_load, np.zeros_like(shard_load[:1])])
            batch, shard = len(places) - 1, 0
        slot = int(np.argmax(places[batch, shard] < 0))
        places[batch, shard, slot] = row
        shard_load[batch, shard] += row_load[row]
    return places


# ------------------------------------------------------------------------------ sources to epochs


def epoch_slice(number: int, weight: float, epoch: int) -> tuple[int, int]:
    """Positions [a, b) that `epoch` reads of a source with `number` samples and this weight.

    The positions run through an endless sequence of permutations of the source. Both ends are
    rounded up, so that the first epoch is never empty; the slack of 1e-9 absorbs the rounding
    errors of floats.

    Example: 10 samples of weight 0.25 are 2.5 per epoch: [0, 3), [3, 5), [5, 8), [8, 10), ...
    """
    start, end = (math.ceil(i * weight * number - 1e-9) for i in (epoch, epoch + 1))
    return start, end
