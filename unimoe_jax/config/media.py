"""The one table of media: everything that is written down per medium, apart from its settings.

A new medium gets its line here, an encoder, a feature file, a branch of the model and a conversion
table; every other module reads this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MediaName = Literal["image", "video", "speech", "audio"]

TEXT = 0
PADDING = -1


@dataclass(frozen=True)
class Medium:
    """One kind of media.

    name: as settings, questions and metrics call it.
    number: its value in `modality_BT` and in the router statistics; text is 0, padding is -1.
    record_key: the key of a JSON record that names its files.
    placeholder: the text that marks where a file stands in a conversation.
    pool_field: the field of `Batch` that holds its entries.
    misspelt_keys: keys that other data sets use instead of `record_key`.
    """

    name: MediaName
    number: int
    record_key: str
    placeholder: str
    pool_field: str
    misspelt_keys: tuple[str, ...]


_SOUND_KEYS = ("voices", "audio", "audios", "speech")

# The order is part of every checkpoint and cached index: a new medium goes to the end.
MEDIA_TABLE = (
    Medium("image", 1, "image", "<image>", "image_GIHWC", ("images",)),
    Medium("video", 2, "video", "<video>", "video_GIFHWC", ("videos",)),
    Medium("speech", 3, "voice", "<audio>", "speech_GJMF", _SOUND_KEYS),
    Medium("audio", 4, "voice", "<audio>", "audio_GJFM", _SOUND_KEYS),
)

MEDIA: tuple[MediaName, ...] = tuple(medium.name for medium in MEDIA_TABLE)
"""Names of all media, in the order of the pools of a batch."""
MODALITY: dict[str, int] = {"text": TEXT} | {m.name: m.number for m in MEDIA_TABLE}
"""Name of a modality -> its number in `modality_BT`."""
NUM_MODALITIES = len(MODALITY)
PLACEHOLDER: dict[MediaName, str] = {m.name: m.placeholder for m in MEDIA_TABLE}
"""Name of a medium -> its placeholder; speech and audio share one."""
RECORD_PLACEHOLDERS: dict[str, str] = {m.record_key: m.placeholder for m in MEDIA_TABLE}
"""Key of a JSON record -> the placeholder of the files that the key names."""
MISSPELT_KEYS: dict[str, tuple[str, ...]] = {m.record_key: m.misspelt_keys for m in MEDIA_TABLE}
"""Key of a JSON record -> the keys that other data sets and `generate --input` use instead."""
POOL_FIELD: dict[MediaName, str] = {m.name: m.pool_field for m in MEDIA_TABLE}
"""Name of a medium -> the field of `Batch` that holds its entries."""

MODALITY_GROUPS: dict[str, tuple[int, ...]] = {
    "image": (MODALITY["image"],),
    "video": (MODALITY["video"],),
    "audio": (MODALITY["speech"], MODALITY["audio"]),
    "text": (TEXT, PADDING),
}
"""The modalities that Uni-MoE 8e tells apart: speech counts as audio, and padding as text."""
