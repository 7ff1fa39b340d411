"""The contract between the loader and the model: one batch of arrays with static shapes.

A pool holds the media of one kind for one data shard. The model turns every pool entry into soft
tokens and concatenates the soft tokens of all pools of a shard, in the order of `MEDIA`, to the
soft-token table of the shard. Pools that the signature lacks are left out. `slot_BT` holds row
numbers of that table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from unimoe_jax.config import MediaName, ModelConfig
from unimoe_jax.config.media import MEDIA, POOL_FIELD

Signature = frozenset[MediaName]
"""The pools that a batch has. One step is compiled per signature."""

BatchArray = Any
"""A numpy array in the loader, a jax array in the model, or an `ArraySpec` in a batch of specs."""


class ArraySpec(NamedTuple):
    """Shape and dtype of one array of a batch."""

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

    A pool that the signature of the batch lacks is None.

    Example: a row with the sample "<bos> a @ @ b </s>", in which @ @ are the two soft tokens of an
    image that is the second entry of its pool, and "b </s>" is the answer:
    token_id [1, a, 0, 0, b, 2], target [0, 0, 0, b, 2, 0], weight [0, 0, 0, 1, 1, 0],
    position [0, 1, 2, 3, 4, 5], slot [-1, -1, 2, 3, -1, -1].
    """

    token_id_BT: BatchArray
    target_BT: BatchArray
    weight_BT: BatchArray
    segment_BT: BatchArray
    position_BT: BatchArray
    modality_BT: BatchArray
    slot_BT: BatchArray
    image_GIHWC: BatchArray = None
    video_GIFHWC: BatchArray = None
    speech_GJMF: BatchArray = None
    audio_GJFM: BatchArray = None
    audio_length_GJ: BatchArray = None


def entry_shapes(model: ModelConfig) -> dict[MediaName, tuple[int, ...]]:
    """Return the shape of one pool entry for each medium that the model has an encoder for."""
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
    """Return a `Batch` of `ArraySpec`s: `rows` x `row_length` positions over `shards` data shards.

    capacity: pool entries per shard for each medium of the signature.
    """
    # Every array with one value per position has the same shape; only the weights are floats.
    int_spec = ArraySpec((rows, row_length), np.dtype(np.int32))
    fields = {name: int_spec for name in Batch._fields if name.endswith("_BT")}
    fields["weight_BT"] = ArraySpec((rows, row_length), np.dtype(np.float32))
    # Pools exist only for the media of the signature.
    shapes = entry_shapes(model)
    for name in MEDIA:
        if name in capacity:
            shape = (shards, capacity[name], *shapes[name])
            fields[POOL_FIELD[name]] = ArraySpec(shape, np.dtype(np.float32))
    if "audio" in capacity:
        fields["audio_length_GJ"] = ArraySpec((shards, capacity["audio"]), np.dtype(np.int32))
    return Batch(**fields)
