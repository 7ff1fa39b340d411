"""Front ends against recorded outputs of the reference (see golden preprocessing/README)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden_dir import golden_dir
from unimoe_jax.data.media import load_image, load_waveform, sound_length
from unimoe_jax.data.processors import (
    beats_fbank,
    chunk_starts,
    image_pixels,
    kaldi_fbank,
    kaldi_filters,
    log_mel,
    split_chunks,
    square_image,
)


@pytest.fixture(scope="module")
def golden():
    with np.load(golden_dir("preprocessing") / "expected_uni.npz") as file:
        return dict(file)


def media(name: str) -> str:
    return str(golden_dir("preprocessing") / "media" / name)


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("name", ["rect", "gray", "rgba"])
def test_images_equal_clip_image_processor(golden, name, aspect):
    image = load_image(media(f"{name}.png"))
    for size in (56, 336):
        key = f"{name}/{aspect}/{size}"
        if f"{key}/uint8_chw" not in golden:
            continue
        pixels = square_image(image, size, aspect)
        np.testing.assert_array_equal(pixels.transpose(2, 0, 1), golden[f"{key}/uint8_chw"])
        if f"{key}/pixel_values" in golden:
            got = image_pixels(image, size, aspect)
            assert got.dtype == np.float32
            expected = golden[f"{key}/pixel_values"]
            np.testing.assert_allclose(got.transpose(2, 0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["a_44k_stereo", "b_8k_mono", "c_8k_long"])
def test_waveforms_and_log_mel_equal_the_reference(golden, name):
    wave = load_waveform(media(f"{name}.wav"))
    assert sound_length(media(f"{name}.wav")) == len(wave)
    if f"{name}/waveform16k" in golden:
        np.testing.assert_allclose(wave, golden[f"{name}/waveform16k"], atol=1e-5)
    else:
        assert len(wave) == golden[f"{name}/waveform16k_len"]
        ends = np.concatenate([wave[:4000], wave[-4000:]])
        np.testing.assert_allclose(ends, golden[f"{name}/waveform16k_head_tail"], atol=1e-5)
    chunks = split_chunks(wave, 480_000, "reference", 20)
    assert len(chunks) == golden[f"{name}/num_chunks"]
    for number, chunk in enumerate(chunks):
        mel = log_mel(chunk, 80, 3000)
        assert mel.shape == (80, 3000)
        assert mel.dtype == np.float32
        key = f"{name}/chunk{number}"
        if f"{key}/log_mel_first100_last100" in golden:
            both = np.concatenate([mel[:, :100], mel[:, -100:]], axis=1)
            np.testing.assert_allclose(both, golden[f"{key}/log_mel_first100_last100"], atol=1e-4)
            continue
        first = golden[f"{key}/log_mel_first_frames"]
        np.testing.assert_allclose(mel[:, : first.shape[1]], first, atol=1e-4)
        rest = mel[:, first.shape[1] :]
        np.testing.assert_allclose(rest, golden[f"{key}/log_mel_pad_value"][0], atol=1e-4)


def test_fbank_equals_torchaudio(golden):
    wave = load_waveform(media("d_16k_beats.wav"))
    filters = golden["kaldi_mel_banks_128"]
    np.testing.assert_allclose(kaldi_filters(128).T, filters, atol=2e-5)
    raw = kaldi_fbank(wave, 128)
    np.testing.assert_allclose(raw, golden["d_16k_beats/fbank_raw_unpadded"], atol=5e-3)
    padded = beats_fbank(wave, 480_000, 128)
    assert padded.shape == tuple(golden["d_16k_beats/fbank_norm_padded30s_shape"])
    first = golden["d_16k_beats/fbank_norm_padded30s_first_frames"]
    np.testing.assert_allclose(padded[: len(first)], first, atol=5e-3)
    tail = golden["d_16k_beats/fbank_norm_padded30s_tail_value"]
    np.testing.assert_allclose(
        padded[len(first) :], tail[None].repeat(2998 - len(first), 0), atol=1e-5
    )


@pytest.mark.parametrize(
    ("samples", "stride", "starts"),
    [
        (10, "exact", [0]),
        (11, "exact", [0, 10]),
        (20, "exact", [0, 10]),
        (21, "exact", [0, 10, 20]),
        (11, "reference", [0]),
        (12, "reference", [0, 11]),
        (21, "reference", [0, 11]),
        (23, "reference", [0, 11, 22]),
    ],
)
def test_chunk_rules(samples, stride, starts):
    assert chunk_starts(samples, 10, stride) == starts
