"""Write the streams of samples into the rows of a batch."""

from __future__ import annotations

import numpy as np

from unimoe_jax.config import MediaName
from unimoe_jax.config.media import MEDIA, MODALITY, PADDING, POOL_FIELD
from unimoe_jax.data.batch import ArraySpec, Batch
from unimoe_jax.data.stream import Stream


class BatchWriter:
    """Fills the arrays of a batch for some shards.

    spec: the batch's array specs for these shards; capacity and tokens: pool entries per shard and
    soft tokens per entry, by medium.
    """

    def __init__(self, spec: Batch, capacity: dict[MediaName, int], tokens: dict[MediaName, int]):
        def empty(name: str, array: ArraySpec | None):
            fills = {"slot_BT": -1, "modality_BT": PADDING}
            return array and np.full(array.shape, fills.get(name, 0), array.dtype)

        arrays = {name: empty(name, array) for name, array in spec._asdict().items()}
        self.batch = Batch(**arrays)
        self.capacity, self.tokens = capacity, tokens
        self._base, start = {}, 0
        for name in MEDIA:
            if name in capacity:
                self._base[name] = start
                start += capacity[name] * tokens[name]
        self._used: dict[tuple[int, str], int] = {}

    def full_audio(self, samples: int) -> None:
        """Give empty audio slots the length of a full chunk, so that no key row is all masked."""
        if self.batch.audio_length_GJ is not None:
            self.batch.audio_length_GJ[:] = samples

    def row(self, number: int, shard: int, streams: list[Stream | None]) -> None:
        """Write one row: its samples one after another, each a segment of its own.

        None (a bad sample) takes a segment number but no position.
        """
        start = 0
        for segment, stream in enumerate(streams, 1):
            if stream is None:
                continue
            at = (number, slice(start, start + len(stream)))
            start += len(stream)
            batch = self.batch
            batch.token_id_BT[at] = stream.token_id
            counts = stream.supervised[1:]
            inner = (number, slice(at[1].start, at[1].stop - 1))
            batch.target_BT[inner] = np.where(counts, stream.token_id[1:], 0)
            batch.weight_BT[inner] = counts
            batch.segment_BT[at] = segment
            batch.position_BT[at] = np.arange(len(stream))
            batch.modality_BT[at] = stream.modality
            batch.slot_BT[at] = self._slots(shard, stream)

    def _slots(self, shard: int, stream: Stream) -> np.ndarray:
        slot = stream.slot.copy()
        for name, arrays in stream.pools.items():
            first = self._used.get((shard, name), 0)
            self._used[shard, name] = first + len(arrays)
            if first + len(arrays) > self.capacity[name]:
                raise AssertionError(f"{name} pool of shard {shard} overflows: the plan is wrong")
            pool = getattr(self.batch, POOL_FIELD[name])
            for offset, array in enumerate(arrays):
                pool[shard, first + offset] = array
            if name == "audio":
                lengths = stream.lengths[name]
                self.batch.audio_length_GJ[shard, first : first + len(lengths)] = lengths
            slot[stream.modality == MODALITY[name]] += self._base[name] + first * self.tokens[name]
        return slot
