"""The contract between loader and model: one batch of numpy arrays with static shapes.

A shard's soft-token table concatenates its pools in the order of `MEDIA`, leaving out pools the
signature lacks; `slot_BT` indexes that table.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unimoe_jax.config import MediaName, ModelConfig
from unimoe_jax.config.media import MEDIA, POOL_FIELD

Signature = frozenset[MediaName]
"""Which pools a batch carries; one compiled step per signature."""


class ArraySpec(NamedTuple):
    """Shape and dtype of one batch array."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Batch(NamedTuple):
    """One batch. B rows of T positions; rows [g*B/G, (g+1)*B/G) belong to data shard g.

    token_id_BT   int32   vocabulary id; 0 at soft tokens and padding
    target_BT     int32   the token to predict at this position (shifted by one); 0 if weight is 0
    weight_BT     float32 1 where the target counts
    segment_BT    int32   0 padding, 1.. one number per sample of the row
    position_BT   int32   restarts at 0 in every segment
    modality_BT   int32   see `MODALITY`; -1 padding
    slot_BT       int32   -1 text and padding, else row of the shard's soft-token table
    image_GIHWC, video_GIFHWC   float32 normalised pixels
    speech_GJMF   float32 log-mel [mel_bins, frames]
    audio_GJFM    float32 normalised fbank [frames, mel_bins]
    audio_length_GJ int32 valid samples of each audio chunk; a full chunk where the slot is empty

    A pool that the batch's signature lacks is None.
    """

    token_id_BT: np.ndarray
    target_BT: np.ndarray
    weight_BT: np.ndarray
    segment_BT: np.ndarray
    position_BT: np.ndarray
    modality_BT: np.ndarray
    slot_BT: np.ndarray
    image_GIHWC: np.ndarray | None = None
    video_GIFHWC: np.ndarray | None = None
    speech_GJMF: np.ndarray | None = None
    audio_GJFM: np.ndarray | None = None
    audio_length_GJ: np.ndarray | None = None


def entry_shapes(model: ModelConfig) -> dict[MediaName, tuple[int, ...]]:
    """Shape of one pool entry per medium the model can take."""
    shapes: dict[MediaName, tuple[int, ...]] = {}
    if model.vision:
        size = model.vision.encoder.image_size
        shapes["image"] = (size, size, 3)
        shapes["video"] = (model.vision.frames, size, size, 3)
    if model.speech:
        shapes["speech"] = (model.speech.encoder.mel_bins, model.speech.num_frames)
    if model.audio:
        shapes["audio"] = (model.audio.num_frames, model.audio.encoder.mel_bins)
    return shapes


def batch_spec(
    model: ModelConfig, rows: int, row_length: int, shards: int, capacity: dict[MediaName, int]
) -> Batch:
    """A `Batch` of `ArraySpec`s: `rows` x `row_length` over `shards`, `capacity` entries each."""
    text = ArraySpec((rows, row_length), np.dtype(np.int32))
    fields: dict[str, ArraySpec] = dict.fromkeys(
        (name for name in Batch._fields if name.endswith("_BT")), text
    )
    fields["weight_BT"] = ArraySpec((rows, row_length), np.dtype(np.float32))
    shapes = entry_shapes(model)
    for name in MEDIA:
        if name in capacity:
            shape = (shards, capacity[name], *shapes[name])
            fields[POOL_FIELD[name]] = ArraySpec(shape, np.dtype(np.float32))
    if "audio" in capacity:
        fields["audio_length_GJ"] = ArraySpec((shards, capacity["audio"]), np.dtype(np.int32))
    return Batch(**fields)
