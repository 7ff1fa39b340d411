"""Which samples form which batch: a pure function of the index, the seed and the settings.

Neither hosts nor workers enter, so any of them may change between runs. A source of weight w is
read w times per epoch: twice, once, or a quarter that moves on every epoch.

Batches grouped by modality have one signature each. Samples with media are packed among their own
signature; samples of text alone change neither signature nor pools of any batch, so they fill what
the others leave: the ends of rows, then places for whole rows. Batches of text alone hold the rest.
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


@dataclass(frozen=True)
class Samples:
    """The good samples of all sources of a mixture.

    source, record int [n]: where a sample is; tokens int [n] positions it takes; entries int
    [n, 4] pool entries in the order of `MEDIA`; names, weights: per source.
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

    batches int [NB, rows] row numbers, -1 for an empty row; signature int [NB]; row r holds
    `members[offsets[r]:offsets[r + 1]]`, numbers of samples.
    """

    batches: np.ndarray
    signature: np.ndarray
    members: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.batches)

    def row(self, number: int) -> list[int]:
        return self.members[self.offsets[number] : self.offsets[number + 1]].tolist()


class _Packed(NamedTuple):
    """One signature of one epoch: rows of sample numbers, batches of row numbers, peak loads."""

    rows: list[np.ndarray]
    batches: np.ndarray
    shard_peak: np.ndarray
    row_peak: np.ndarray


def _sums(values: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """Sums over the samples of each row: int [n, ...] values of samples -> int [rows, ...]."""
    if not rows:
        return values[:0]
    starts = np.cumsum([0, *map(len, rows[:-1])])
    return np.add.reduceat(values[np.concatenate(rows)], starts, axis=0)


class BatchPlan:
    """Batches of all epochs, computed when first asked for.

    Raises ValueError if `rows` is no multiple of `shards`, or if there is no sample at all.
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
        self._lock = threading.RLock()
        self._epochs: OrderedDict[int, EpochPlan] = OrderedDict()
        self._sizes: list[int] = []
        self._digests: dict[int, str] = {}
        self._groups = self._group()
        self.signatures: list[Signature] = [group[0] for group in self._groups]
        # The signatures are sorted: text alone is the first, if there is any.
        self._text_fills = loader.packing and len(self.signatures) > 1 and not self.signatures[0]
        self._limits = [self._limit(members) for _, members in self._groups]
        self._capacity: list[np.ndarray] | None = None  # unlimited while simulating
        self._capacity = self._simulate()

    def __getstate__(self):
        state = dict(self.__dict__)
        del state["_lock"]
        return state

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.RLock())

    def _group(self) -> list[tuple[Signature, np.ndarray]]:
        present = self.samples.entries > 0
        if not self.loader.group_by_modality:
            present = np.broadcast_to(present.any(axis=0), present.shape)
        codes = present @ (1 << np.arange(len(MEDIA)))
        return [
            (
                frozenset(name for i, name in enumerate(MEDIA) if code >> i & 1),
                np.flatnonzero(codes == code),
            )
            for code in np.unique(codes)
        ]

    def _limit(self, members: np.ndarray) -> np.ndarray:
        tokens, entries = self.samples.tokens[members], self.samples.entries[members]
        if not self.loader.packing:
            return entries.max(axis=0)
        return row_limit(tokens, entries, self.loader.row_length)

    def _simulate(self) -> list[np.ndarray]:
        """Pool capacities per shard: what the first epochs need, at least any one row's load."""
        need = [self.samples.entries[members].max(axis=0) for _, members in self._groups]
        shard_peaks, row_peaks = list(need), list(need)
        for epoch in range(SIMULATED_EPOCHS if self.shuffle else 1):
            for number, packed in enumerate(self._pack(epoch)):
                shard_peaks[number] = np.maximum(shard_peaks[number], packed.shard_peak)
                row_peaks[number] = np.maximum(row_peaks[number], packed.row_peak)
        # Later epochs pack within what these rows needed, so that any row fits into any shard.
        self._limits = row_peaks
        return [np.maximum(*peaks) for peaks in zip(shard_peaks, row_peaks, strict=True)]

    def capacity(self, signature: Signature) -> dict[MediaName, int]:
        """Pool entries per shard for each medium of a signature, constant over epochs."""
        numbers = self._capacity[self.signatures.index(signature)]
        return {name: int(numbers[i]) for i, name in enumerate(MEDIA) if name in signature}

    # ------------------------------------------------------------------------- one epoch

    def _chosen(self, epoch: int) -> np.ndarray:
        """Numbers of the samples of an epoch, by source, each source in its own random order."""
        chosen = []
        for source, weight in enumerate(self.samples.weights):
            own = np.flatnonzero(self.samples.source == source)
            start, end = epoch_slice(len(own), weight, epoch)
            for cycle in range(start // max(len(own), 1), -(-end // max(len(own), 1))):
                order = self._order(len(own), 1, source, cycle)
                first = cycle * len(own)
                chosen.append(own[order[max(start - first, 0) : end - first]])
        return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)

    def _order(self, number: int, *key: int) -> np.ndarray:
        """0 … number - 1, in a random order if the plan shuffles."""
        if not self.shuffle:
            return np.arange(number)
        return np.random.default_rng([self.seed, *key]).permutation(number)

    def _pack(self, epoch: int) -> list[_Packed]:
        """The rows and batches of an epoch, signature by signature."""
        rows = self._rows(epoch)
        if not self._text_fills:
            return [self._arrange(epoch, number, own) for number, own in enumerate(rows)]
        text, *media = rows
        text = [text[row] for row in self._order(len(text), 5, epoch)]
        packed = []
        for number, own in enumerate(media, 1):
            part = self._arrange(epoch, number, own)
            # Only now: rows with media that had to move came first.
            free = np.argwhere(part.batches < 0)[: len(text)]
            part.batches[tuple(free.T)] = len(own) + np.arange(len(free))
            packed.append(part._replace(rows=own + text[: len(free)]))
            text = text[len(free) :]
        return [self._arrange(epoch, 0, text), *packed]

    def _rows(self, epoch: int) -> list[list[np.ndarray]]:
        """The rows of an epoch, signature by signature, text in the ends of those with media:
        numbers of the samples of each."""
        chosen = self._chosen(epoch)
        chosen = chosen[self._order(len(chosen), 2, epoch)]
        groups = [chosen[np.isin(chosen, members)] for _, members in self._groups]
        if not self._text_fills:
            return [self._fill(number, own) for number, own in enumerate(groups)]
        text, *media = groups
        rows = [self._fill(number, own) for number, own in enumerate(media, 1)]
        tokens, every = self.samples.tokens, [row for part in rows for row in part]
        # In random order: where text is scarce, every signature receives its share.
        order = self._order(len(every), 6, epoch)
        room = self.loader.row_length - _sums(tokens, every)
        added = fill_ends(tokens[text], room[order])
        for at, more in zip(order.tolist(), added, strict=True):
            every[at] = np.concatenate([every[at], text[more]])
        rest = np.delete(text, [sample for more in added for sample in more])
        filled = iter(every)
        return [self._fill(0, rest), *(list(islice(filled, len(part))) for part in rows)]

    def _fill(self, number: int, own: np.ndarray) -> list[np.ndarray]:
        """Samples of one signature in rows."""
        if not self.loader.packing:
            return list(own[:, None])
        tokens, entries = self.samples.tokens[own], self.samples.entries[own]
        rows = fill_rows(tokens, entries, self.loader.row_length, self._limits[number])
        return [own[row] for row in rows]

    def _arrange(self, epoch: int, number: int, rows: list[np.ndarray]) -> _Packed:
        """Rows of one signature in batches."""
        load = _sums(self.samples.entries, rows)
        order = self._order(len(rows), 3, epoch, number)
        capacity = self._capacity[number] if self._capacity is not None else None
        batches, peak = arrange(load[order], self.loader.rows, self.shards, capacity)
        batches = np.where(batches < 0, -1, order[batches]) if len(order) else batches
        return _Packed(rows, batches, peak, load.max(axis=0, initial=0))

    def epoch(self, number: int) -> EpochPlan:
        """The batches of an epoch; the last few epochs asked for are kept."""
        with self._lock:
            if number not in self._epochs:
                self._epochs[number] = self._plan(number)
                while len(self._epochs) > 2:
                    self._epochs.popitem(last=False)
            return self._epochs[number]

    def _plan(self, epoch: int) -> EpochPlan:
        rows, batches, signature = [], [], []
        for number, packed in enumerate(self._pack(epoch)):
            shifted = np.where(packed.batches < 0, -1, packed.batches + len(rows))
            batches.append(shifted)
            signature += [number] * len(shifted)
            rows += packed.rows
        table = np.concatenate(batches)
        order = self._order(len(table), 4, epoch)
        offsets = np.cumsum([0, *(len(row) for row in rows)])
        members = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        return EpochPlan(table[order], np.array(signature, np.int64)[order], members, offsets)

    # ------------------------------------------------------------------------- all epochs

    def start_of(self, epoch: int) -> int:
        """The step an epoch begins with."""
        with self._lock:
            while len(self._sizes) < epoch:
                self._sizes.append(len(self.epoch(len(self._sizes))))
            return sum(self._sizes[:epoch])

    def locate(self, step: int) -> tuple[int, int]:
        """Global step -> (epoch, batch within it)."""
        epoch = 0
        while step >= self.start_of(epoch + 1):
            epoch += 1
            if epoch > step + 1000:
                raise ValueError("the mixture's weights leave the epochs empty")
        return epoch, step - self.start_of(epoch)

    def batch(self, step: int) -> tuple[int, np.ndarray, EpochPlan]:
        """(number of the signature, row numbers [rows], the epoch they belong to)."""
        epoch, position = self.locate(step)
        plan = self.epoch(epoch)
        return int(plan.signature[position]), plan.batches[position], plan

    def loads(self, step: int) -> np.ndarray:
        """Positions taken, soft tokens included, then pool entries of every medium in the order of
        `MEDIA`, of each shard of a step's batch: int [shards, 1 + M]."""
        _, rows, plan = self.batch(step)
        sizes = np.column_stack([self.samples.tokens, self.samples.entries])
        own = [plan.row(row) if row >= 0 else [] for row in rows.tolist()]
        table = np.array([sizes[members].sum(axis=0) for members in own], np.int64)
        return table.reshape(self.shards, -1, sizes.shape[1]).sum(axis=1)

    def fingerprint(self, step: int = 0) -> str:
        """Digest of the epoch that a step lies in: where it begins, and which samples form each of
        its batches, whatever the shards."""
        epoch, _ = self.locate(step)
        with self._lock:
            if epoch not in self._digests:
                self._digests[epoch] = self._digest(epoch)
            return self._digests[epoch]

    def _digest(self, epoch: int) -> str:
        plan = self.epoch(epoch)
        digest = hashlib.sha256(str(self.start_of(epoch)).encode())
        samples = self.samples
        for rows in plan.batches:
            for row in np.sort(rows[rows >= 0]):
                own = plan.members[plan.offsets[row] : plan.offsets[row + 1]]
                table = [samples.source[own], samples.record[own], samples.tokens[own]]
                digest.update(np.stack(table).astype("<i8").tobytes())
            digest.update(b"|")
        return digest.hexdigest()
