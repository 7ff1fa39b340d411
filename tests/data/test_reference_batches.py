"""Whole records of the recorded runs: every file goes through `Processors` and is compared with the
recorded output of the original collator."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.golden_dir import recorded_cumo, recorded_systems
from unimoe_jax.config import (
    AudioConfig,
    BeatsConfig,
    ClipConfig,
    DecoderConfig,
    ModelConfig,
    QueryConnectorConfig,
    SpeechConfig,
    VisionConfig,
    WhisperConfig,
)
from unimoe_jax.data.processors import Processors
from unimoe_jax.data.record_files import RecordFile
from unimoe_jax.data.records import RecordReader
from unimoe_jax.data.samples import SampleReader
from unimoe_jax.data.tokenizer import Tokenizer

SMALL = {"hidden_size": 8, "mlp_dim": 8, "num_layers": 1, "num_heads": 1}
QUERIES = QueryConnectorConfig(kind="qformer", num_queries=10, **SMALL)


def model(voice: str, image_size: int, aspect: str) -> ModelConfig:
    speech = SpeechConfig(
        encoder=WhisperConfig(max_positions=1500, **SMALL),
        connector=QUERIES,
        chunk_stride="reference",
    )
    audio = AudioConfig(encoder=BeatsConfig(embed_size=8, **SMALL), connector=QUERIES)
    return ModelConfig(
        decoder=DecoderConfig(vocab_size=384, num_kv_heads=1, **SMALL),
        vision=VisionConfig(
            encoder=ClipConfig(image_size=image_size, patch_size=14, **SMALL), aspect=aspect
        ),
        speech=speech if voice == "speech" else None,
        audio=audio if voice == "audio" else None,
    )


@pytest.mark.parametrize("root", recorded_systems(), ids=lambda root: root.name)
def test_media_equal_the_reference_collator(root):
    with np.load(root / "inputs.npz") as file:
        names = ("images", "videos", "input_features", "features_mask", "image_mask", "video_mask")
        expected = {name: file[name] for name in names}
        voice = "audio" if "padding_masks" in file else "speech"
    # The collator crops or pads images as config.json of the fine-tuned model says.
    tuned = next(root.glob("checkpoint/*/adapter_config.json")).with_name("config.json")
    aspect = json.loads(tuned.read_text()).get("image_aspect_ratio") or "square"
    config = model(voice, expected["images"].shape[-1], aspect)
    accepts = frozenset(config.tokens_per_medium())
    reader = RecordReader(root.name, RecordFile(root / "data.json"), root, voice, accepts)
    processors = Processors(config)
    compared = dict.fromkeys(accepts, 0)
    for row in range(len(reader)):
        chunk = 0
        for files in reader.record(row).media.values():
            for number, file in enumerate(files, 1):
                entries = processors.load(file)
                assert processors.count(file) == (len(entries.arrays), entries.found)
                compared[file.modality] += len(entries.arrays)
                if file.modality == "image":
                    got = entries.arrays[0].transpose(2, 0, 1)
                    np.testing.assert_allclose(got, expected["images"][row], atol=1e-5)
                elif file.modality == "video":
                    got = entries.arrays[0].transpose(0, 3, 1, 2)
                    np.testing.assert_allclose(got, expected["videos"][row], atol=1e-5)
                else:
                    for array in entries.arrays:
                        want = expected["input_features"][row, chunk].reshape(array.shape)
                        tolerance = 1e-4 if voice == "speech" else 5e-3
                        np.testing.assert_allclose(array, want, atol=tolerance)
                        assert expected["features_mask"][row, chunk] == number
                        chunk += 1
        assert not expected["features_mask"][row, chunk:].any()
    # Every medium of the recorded batch was compared, and no other.
    assert compared == {
        "image": expected["image_mask"].sum(),
        "video": expected["video_mask"].sum(),
        voice: (expected["features_mask"] > 0).sum(),
    }
    assert compared[voice] > 0


@pytest.mark.parametrize("root", recorded_cumo(), ids=lambda root: root.name)
def test_cumo_samples_equal_the_reference_collator(root):
    """One image per sample, padded to a square; an image of zeros for a sample without images."""
    folder = next(root.glob("checkpoint/*/tokenizer.model")).parent
    aspect = json.loads((folder / "config.json").read_text())["image_aspect_ratio"]
    with np.load(root / "inputs.npz") as file:
        images, ids, labels = (file[name] for name in ("images", "input_ids", "labels"))
    side = images.shape[-1]
    vision = VisionConfig(
        encoder=ClipConfig(image_size=side, patch_size=14, **SMALL),
        aspect=aspect,
        unused_images="count",
    )
    config = ModelConfig(
        decoder=DecoderConfig(vocab_size=384, num_kv_heads=1, **SMALL), vision=vision
    )
    records = RecordReader(
        root.name, RecordFile(root / "data.json"), root / "media", None, frozenset({"image"})
    )
    reader = SampleReader(
        records,
        Tokenizer.load(folder),
        Processors(config),
        "mistral_instruct_system",
        max_length=4096,
    )
    assert len(reader) == len(images)
    blank = 0
    for row in range(len(reader)):
        stream, events = reader.load(row, reader.measure(row)[0])
        assert not events
        (pixels,) = stream.pools["image"]
        np.testing.assert_allclose(pixels.transpose(2, 0, 1), images[row], atol=1e-5)
        soft = (ids[row] == -200).sum() * config.vision.num_tokens
        assert (stream.slot >= 0).sum() == soft
        blank += soft == 0
        text = stream.modality == 0
        real = [i for i in ids[row].tolist() if i > 0]
        assert stream.token_id[text].tolist() == real
        supervised = stream.token_id[stream.supervised].tolist()
        assert supervised == [i for i in labels[row].tolist() if i >= 0]
    assert 0 < blank < len(reader)
