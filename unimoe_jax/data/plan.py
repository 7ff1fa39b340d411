"""Which samples form which batch: a pure function of the index, the seed and the settings.

Neither hosts nor workers take part, so the number of either may change between runs. A source of
weight w is read w times per epoch: with weight 2 twice, with weight 0.25 a quarter of it, which is
another quarter in every epoch.

Batches grouped by modality have one signature each. Samples with media are packed among samples of
the same signature. Samples of text alone change neither the signature nor the pools of any batch,
so they fill the positions that the others leave free: first the ends of rows, then places for whole
rows. Batches of text alone hold the rest.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from unimoe_jax.config import LoaderConfig, MediaName
from unimoe_jax.config.media import MEDIA
from unimoe_jax.data.batch import Signature
from unimoe_jax.data.packing import arrange, epoch_slice, fill_ends, fill_rows, row_limit

SIMULATED_EPOCHS = 3
"""Epochs over which pool capacities must hold without moving rows."""
KEPT_EPOCHS = 2
"""Epochs whose plans are kept in memory."""

# First part of the key of each random order, so that no two orders are the same. A resumed run must
# find the same orders again, so these numbers never change.
_SOURCE_ORDER, _EPOCH_ORDER, _ROW_ORDER, _BATCH_ORDER, _TEXT_ROW_ORDER, _END_ORDER = range(1, 7)


@dataclass(frozen=True)
class Samples:
    """The good samples of all sources of a mixture.

    source, record int [n]: number of the source, and of the record in it; tokens int [n]: positions
    of the sample; entries int [n, 4]: pool entries in the order of `MEDIA`; names, weights: per
    source.
    """

    source: np.ndarray
    record: np.ndarray
    tokens: np.ndarray
    entries: np.ndarray
    names: tuple[str, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch.

    batches int [NB, rows] row numbers, -1 for an empty row; signature int [NB]; row r holds the
    samples `members[offsets[r]:offsets[r + 1]]`.
    """

    batches: np.ndarray
    signature: np.ndarray
    members: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.batches)

    def row(self, number: int) -> list[int]:
        """The samples of a row."""
        return self.members[self.offsets[number] : self.offsets[number + 1]].tolist()


class _Packed(NamedTuple):
    """The samples of one signature and epoch, packed.

    rows: numbers of the samples of each row; batches int [NB, rows] row numbers, -1 empty;
    shard_peak, row_peak int [M]: the largest loads of any shard and of any row.
    """

    rows: list[np.ndarray]
    batches: np.ndarray
    shard_peak: np.ndarray
    row_peak: np.ndarray


def _sum_rows(values: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """Sum over the samples of each row: int [n, ...] values of samples -> int [rows, ...].

    Example: values [5, 1, 2, 7] and rows [0, 3] and [1] give [12, 1].
    """
    if not rows:
        return values[:0]
    starts = np.cumsum([0, *map(len, rows[:-1])])
    return np.add.reduceat(values[np.concatenate(rows)], starts, axis=0)


class BatchPlan:
    """The batches of all epochs, each epoch computed when it is first asked for.

    Raises ValueError if `rows` is not a multiple of `shards`, or if there is no sample at all.
    """

    def __init__(
        self, samples: Samples, loader: LoaderConfig, seed: int, shards: int, shuffle: bool
    ):
        if loader.rows % shards:
            raise ValueError(
                f"loader.rows = {loader.rows} is not a multiple of the {shards} data shards"
            )
        if not len(samples):
            raise ValueError(f"no usable sample in {', '.join(samples.names)}")
        self.samples, self.loader = samples, loader
        self.seed, self.shards, self.shuffle = seed, shards, shuffle
        # Loader threads ask for epochs at the same time.
        self._lock = threading.RLock()
        self._epochs: OrderedDict[int, EpochPlan] = OrderedDict()
        self._epoch_sizes: list[int] = []
        self._digests: dict[int, str] = {}
        self._groups = self._group()
        self.signatures: list[Signature] = [signature for signature, _ in self._groups]
        # The signatures are sorted: if there are samples of text alone, their signature is first.
        self._text_fills = loader.packing and len(self.signatures) > 1 and not self.signatures[0]
        self._limits = [self._limit(members) for _, members in self._groups]
        # Capacities are unlimited while the first epochs are simulated to find them.
        self._capacity: list[np.ndarray] | None = None
        self._capacity = self._simulate()

    def __getstate__(self):
        # A lock cannot be pickled; a worker process makes a new one.
        state = dict(self.__dict__)
        del state["_lock"]
        return state

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.RLock())

    # ------------------------------------------------------------------ groups and capacities

    def _group(self) -> list[tuple[Signature, np.ndarray]]:
        """The signatures, sorted, each with the numbers of its samples."""
        present = self.samples.entries > 0
        if not self.loader.group_by_modality:
            # Every sample counts as having all media that occur, so there is one group.
            present = np.broadcast_to(present.any(axis=0), present.shape)
        # A binary number with one bit per medium; 0 is text alone.
        codes = present @ (1 << np.arange(len(MEDIA)))
        return [
            (
                frozenset(name for i, name in enumerate(MEDIA) if code >> i & 1),
                np.flatnonzero(codes == code),
            )
            for code in np.unique(codes)
        ]

    def _limit(self, members: np.ndarray) -> np.ndarray:
        """Largest number of pool entries of a row of these samples, int [M]."""
        tokens, entries = self.samples.tokens[members], self.samples.entries[members]
        if not self.loader.packing:
            return entries.max(axis=0)
        return row_limit(tokens, entries, self.loader.row_length)

    def _simulate(self) -> list[np.ndarray]:
        """Pool capacities per shard, int [M] per signature: what the first epochs need, and at
        least the load of any single row."""
        largest_sample = [self.samples.entries[members].max(axis=0) for _, members in self._groups]
        shard_peaks, row_peaks = list(largest_sample), list(largest_sample)
        for epoch in range(SIMULATED_EPOCHS if self.shuffle else 1):
            for number, packed in enumerate(self._pack(epoch)):
                shard_peaks[number] = np.maximum(shard_peaks[number], packed.shard_peak)
                row_peaks[number] = np.maximum(row_peaks[number], packed.row_peak)
        # Later epochs limit their rows to what these rows needed, so that any row fits into any
        # shard.
        self._limits = row_peaks
        return [
            np.maximum(shard_peak, row_peak)
            for shard_peak, row_peak in zip(shard_peaks, row_peaks, strict=True)
        ]

    def capacity(self, signature: Signature) -> dict[MediaName, int]:
        """Pool entries per shard for each medium of a signature, the same in all epochs."""
        assert self._capacity is not None, "the capacities are known when the plan has been made"
        numbers = self._capacity[self.signatures.index(signature)]
        return {name: int(numbers[i]) for i, name in enumerate(MEDIA) if name in signature}

    # ------------------------------------------------------------------------- one epoch

    def _chosen(self, epoch: int) -> np.ndarray:
        """Numbers of the samples of an epoch, source by source, each in a separate random order.

        Example: a source of 4 samples with weight 1.5 is read in cycles, each a new order of its
        samples. Epoch 0 takes 6 samples: the first cycle and half of the second. Epoch 1 takes the
        other half and the third cycle.
        """
        chosen = []
        for source, weight in enumerate(self.samples.weights):
            members = np.flatnonzero(self.samples.source == source)
            size = len(members)
            start, end = epoch_slice(size, weight, epoch)
            for cycle in range(start // max(size, 1), -(-end // max(size, 1))):
                order = self._order(size, _SOURCE_ORDER, source, cycle)
                first = cycle * size
                chosen.append(members[order[max(start - first, 0) : end - first]])
        return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)

    def _order(self, number: int, *key: int) -> np.ndarray:
        """0 … number - 1, in a random order (which depends on `key`) if the plan shuffles."""
        if not self.shuffle:
            return np.arange(number)
        return np.random.default_rng([self.seed, *key]).permutation(number)

    def _pack(self, epoch: int) -> list[_Packed]:
        """The rows and batches of an epoch, signature by signature."""
        rows = self._rows(epoch)
        if not self._text_fills:
            return [
                self._arrange(epoch, number, group_rows) for number, group_rows in enumerate(rows)
            ]
        text_rows, *media_rows = rows
        order = self._order(len(text_rows), _TEXT_ROW_ORDER, epoch)
        text_rows = [text_rows[row] for row in order]
        packed = []
        for number, group_rows in enumerate(media_rows, 1):
            part = self._arrange(epoch, number, group_rows)
            # Place text-only rows last, in the places that rows with media left free: a row with
            # media that had to leave its shard may need such a place.
            free = np.argwhere(part.batches < 0)[: len(text_rows)]
            part.batches[tuple(free.T)] = len(group_rows) + np.arange(len(free))
            packed.append(part._replace(rows=group_rows + text_rows[: len(free)]))
            text_rows = text_rows[len(free) :]
        return [self._arrange(epoch, 0, text_rows), *packed]

    def _rows(self, epoch: int) -> list[list[np.ndarray]]:
        """The rows of an epoch, signature by signature: the numbers of the samples of each row.

        Samples of text alone first fill the ends of rows with media.
        """
        chosen = self._chosen(epoch)
        chosen = chosen[self._order(len(chosen), _EPOCH_ORDER, epoch)]
        groups = [chosen[np.isin(chosen, members)] for _, members in self._groups]
        if not self._text_fills:
            return [self._fill(number, members) for number, members in enumerate(groups)]
        # Pack the samples with media, signature by signature.
        text, *media = groups
        media_rows = [self._fill(number, members) for number, members in enumerate(media, 1)]
        # Fill the ends of these rows with text. The rows are visited in random order, so that every
        # signature receives its share if there is little text.
        all_rows = [row for group_rows in media_rows for row in group_rows]
        order = self._order(len(all_rows), _END_ORDER, epoch)
        room = self.loader.row_length - _sum_rows(self.samples.tokens, all_rows)
        added = fill_ends(self.samples.tokens[text], room[order])
        for row, samples in zip(order.tolist(), added, strict=True):
            all_rows[row] = np.concatenate([all_rows[row], text[samples]])
        # Pack the remaining text by itself, and split the rows with media by signature again.
        remaining_text = np.delete(text, [sample for samples in added for sample in samples])
        filled = iter(all_rows)
        split_rows = [list(islice(filled, len(group_rows))) for group_rows in media_rows]
        return [self._fill(0, remaining_text), *split_rows]

    def _fill(self, number: int, members: np.ndarray) -> list[np.ndarray]:
        """Pack samples of signature `number` into rows."""
        if not self.loader.packing:
            return list(members[:, None])
        tokens, entries = self.samples.tokens[members], self.samples.entries[members]
        rows = fill_rows(tokens, entries, self.loader.row_length, self._limits[number])
        return [members[row] for row in rows]

    def _arrange(self, epoch: int, number: int, rows: list[np.ndarray]) -> _Packed:
        """Form batches of the rows of signature `number`."""
        load = _sum_rows(self.samples.entries, rows)
        # `arrange` keeps rows of equal load in order, so it gets them in a random order.
        order = self._order(len(rows), _ROW_ORDER, epoch, number)
        capacity = self._capacity[number] if self._capacity is not None else None
        batches, peak = arrange(load[order], self.loader.rows, self.shards, capacity)
        batches = np.where(batches < 0, -1, order[batches]) if len(order) else batches
        return _Packed(rows, batches, peak, load.max(axis=0, initial=0))

    def epoch(self, number: int) -> EpochPlan:
        """The batches of an epoch; the plans of the last few epochs are kept."""
        with self._lock:
            if number not in self._epochs:
                self._epochs[number] = self._plan(number)
                while len(self._epochs) > KEPT_EPOCHS:
                    self._epochs.popitem(last=False)
            return self._epochs[number]

    def _plan(self, epoch: int) -> EpochPlan:
        """Compute the batches of an epoch, of all signatures in one random order."""
        rows, batches, signature = [], [], []
        for number, packed in enumerate(self._pack(epoch)):
            # Rows are numbered over all signatures.
            shifted = np.where(packed.batches < 0, -1, packed.batches + len(rows))
            batches.append(shifted)
            signature += [number] * len(shifted)
            rows += packed.rows
        table = np.concatenate(batches)
        order = self._order(len(table), _BATCH_ORDER, epoch)
        offsets = np.cumsum([0, *(len(row) for row in rows)])
        members = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        return EpochPlan(table[order], np.array(signature, np.int64)[order], members, offsets)

    # ------------------------------------------------------------------------- all epochs

    def start_of(self, epoch: int) -> int:
        """The first step of an epoch."""
        with self._lock:
            while len(self._epoch_sizes) < epoch:
                self._epoch_sizes.append(len(self.epoch(len(self._epoch_sizes))))
            return sum(self._epoch_sizes[:epoch])

    def locate(self, step: int) -> tuple[int, int]:
        """Global step -> (epoch, batch within it)."""
        epoch = 0
        while step >= self.start_of(epoch + 1):
            epoch += 1
            # Small weights may leave single epochs empty, but not a thousand more than there are
            # steps.
            if epoch > step + 1000:
                raise ValueError("the mixture's weights leave the epochs empty")
        return epoch, step - self.start_of(epoch)

    def batch(self, step: int) -> tuple[int, np.ndarray, EpochPlan]:
        """(number of the signature, row numbers int [rows], the epoch they belong to)."""
        epoch, position = self.locate(step)
        plan = self.epoch(epoch)
        return int(plan.signature[position]), plan.batches[position], plan

    def loads(self, step: int) -> np.ndarray:
        """What each shard of a step's batch holds: int [shards, 1 + M].

        The first column is occupied positions, soft tokens included; the others are pool entries in
        the order of `MEDIA`.
        """
        _, rows, plan = self.batch(step)
        sizes = np.column_stack([self.samples.tokens, self.samples.entries])
        members = [plan.row(row) if row >= 0 else [] for row in rows.tolist()]
        row_loads = np.array([sizes[samples].sum(axis=0) for samples in members], np.int64)
        return row_loads.reshape(self.shards, -1, sizes.shape[1]).sum(axis=1)

    def fingerprint(self, step: int = 0) -> str:
        """A digest of the epoch that contains `step`: its first step, and the samples of each of
        its batches, whatever shards they are on."""
        epoch, _ = self.locate(step)
        with self._lock:
            if epoch not in self._digests:
                self._digests[epoch] = self._digest(epoch)
            return self._digests[epoch]

    def _digest(self, epoch: int) -> str:
        plan, samples = self.epoch(epoch), self.samples
        digest = hashlib.sha256(str(self.start_of(epoch)).encode())
        for rows in plan.batches:
            # Sorted rows, because shards only change the order of the rows within a batch.
            for row in np.sort(rows[rows >= 0]):
                members = plan.row(row)
                table = [samples.source[members], samples.record[members], samples.tokens[members]]
                digest.update(np.stack(table).astype("<i8").tobytes())
            digest.update(b"|")
        return digest.hexdigest()
