"""Tiny models, records and writers of media files for the tests of the loader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from unimoe_jax.config import (
    AudioConfig,
    BeatsConfig,
    ClipConfig,
    DataConfig,
    DecoderConfig,
    LoaderConfig,
    ModelConfig,
    QueryConnectorConfig,
    SourceConfig,
    SpeechConfig,
    VisionConfig,
    WhisperConfig,
)
from unimoe_jax.data.batch import Batch

LOADER = LoaderConfig(row_length=256, rows=4, threads=2, prefetch=2)


def model_config(speech=True, audio=True, max_chunks=3) -> ModelConfig:
    """A tiny model: images of 16x16 pixels (4 soft tokens), 2 s chunks of sound (3 soft tokens)."""
    small = {"hidden_size": 8, "mlp_dim": 8, "num_layers": 1, "num_heads": 1}
    queries = QueryConnectorConfig(kind="qformer", num_queries=3, **small)
    return ModelConfig(
        decoder=DecoderConfig(vocab_size=340, num_kv_heads=1, **small),
        vision=VisionConfig(encoder=ClipConfig(image_size=16, patch_size=8, **small), frames=4),
        speech=SpeechConfig(
            encoder=WhisperConfig(max_positions=100, mel_bins=8, **small),
            connector=queries,
            chunk_seconds=2,
            max_chunks=max_chunks,
        )
        if speech
        else None,
        audio=AudioConfig(
            encoder=BeatsConfig(embed_size=8, mel_bins=16, **small),
            connector=queries,
            chunk_seconds=2,
            max_chunks=max_chunks,
        )
        if audio
        else None,
    )


class Folder:
    """The folder of a small data set: writes media and record files, returns their names."""

    def __init__(self, root: Path):
        self.root = root

    def image(self, name: str, size=(20, 18), mode="RGB", value=120, **save) -> str:
        colour = value if mode in ("L", "I;16") else (value, 30, 60, 0)[: len(mode)]
        Image.new(mode, size, colour).save(self.root / name, **save)
        return name

    def sound(self, name: str, seconds=1.0, rate=16000, channels=1, nan=False, **write) -> str:
        count = int(seconds * rate)
        wave = 0.3 * np.sin(np.arange(count * channels) / 17).reshape(count, channels)
        if nan:
            wave[count // 2] = np.nan
            write = {"subtype": "FLOAT"}
        soundfile.write(self.root / name, wave, rate, **write)
        return name

    def write(self, name: str, records: list, lines=False) -> Path:
        path = self.root / name
        text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
        path.write_text(text)
        return path


def talk(question="what is this", answer="a red bird", **media) -> dict:
    """A record with one question and one answer; media: further keys of the record."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**media, "conversations": turns}


def data_config(path, loader=None, **source) -> DataConfig:
    """Data settings with one source, called `all`."""
    loader = loader or LoaderConfig(row_length=256, rows=4)
    return DataConfig(sources={"all": SourceConfig(path=str(path), **source)}, loader=loader)


def assert_same(one: Batch, two: Batch) -> None:
    for name, a, b in zip(Batch._fields, one, two, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=name)
