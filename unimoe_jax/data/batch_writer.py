"""Write the streams of samples into the rows of a batch, and their media into its pools."""

from __future__ import annotations

import numpy as np

from unimoe_jax.config import MediaName
from unimoe_jax.config.media import MEDIA, MODALITY, PADDING, POOL_FIELD
from unimoe_jax.data.batch import Batch
from unimoe_jax.data.stream import Stream

_EMPTY_VALUE = {"slot_BT": -1, "modality_BT": PADDING}
"""What empty positions hold, in the arrays in which it is not 0."""


class BatchWriter:
    """Fills the arrays of a batch for some of its shards.

    spec: the array specs of the batch for these shards; capacity: pool entries per shard and
    tokens: soft tokens per entry, both by medium. The finished arrays are in `batch`.

    Example: with a capacity of 2 images of 4 soft tokens and 3 audio chunks of 3 soft tokens, a
    shard's soft-token table has 2*4 + 3*3 = 17 rows. Its second image begins at row 4, and its
    first audio chunk at row 8.
    """

    def __init__(self, spec: Batch, capacity: dict[MediaName, int], tokens: dict[MediaName, int]):
        arrays = {
            name: np.full(array.shape, _EMPTY_VALUE.get(name, 0), array.dtype)
            for name, array in spec._asdict().items()
            if array is not None
        }
        self.batch = Batch(**arrays)
        self.capacity, self.tokens = capacity, tokens
        # The row of the soft-token table at which the pool of each medium begins.
        self._first_row: dict[MediaName, int] = {}
        table_rows = 0
        for name in MEDIA:
            if name in capacity:
                self._first_row[name] = table_rows
                table_rows += capacity[name] * tokens[name]
        # Pool entries written so far, by shard and medium.
        self._used: dict[tuple[int, str], int] = {}

    def full_audio(self, samples: int) -> None:
        """Give empty audio slots the length of a full chunk, so that no key row is all masked."""
        if self.batch.audio_length_GJ is not None:
            self.batch.audio_length_GJ[:] = samples

    def row(self, number: int, shard: int, streams: list[Stream | None]) -> None:
        """Write row `number`: its samples one after another, each as a separate segment.

        A bad sample is None. It takes a segment number but no position.
        """
        batch, start = self.batch, 0
        for segment, stream in enumerate(streams, 1):
            if stream is None:
                continue
            end = start + len(stream)
            place = (number, slice(start, end))
            batch.token_id_BT[place] = stream.token_id
            batch.segment_BT[place] = segment
            batch.position_BT[place] = np.arange(len(stream))
            batch.modality_BT[place] = stream.modality
            batch.slot_BT[place] = self._write_media(shard, stream)
            # Every position predicts the next one, so the last position has no target.
            learned = stream.supervised[1:]
            all_but_last = (number, slice(start, end - 1))
            batch.target_BT[all_but_last] = np.where(learned, stream.token_id[1:], 0)
            batch.weight_BT[all_but_last] = learned
            start = end

    def _write_media(self, shard: int, stream: Stream) -> np.ndarray:
        """Append the media of a sample to the pools of `shard`; return the slots int32 [n] of its
        positions in the soft-token table."""
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
            # So far the slots count from the sample's first soft token of this medium.
            before = self._first_row[name] + first * self.tokens[name]
            slot[stream.modality == MODALITY[name]] += before
        return slot
