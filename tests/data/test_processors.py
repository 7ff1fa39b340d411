"""Front ends against recorded outputs of the reference (see golden preprocessing/README)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden_dir import golden_dir, split_key, thin
from unimoe_jax.data.features.beats import beats_fbank, kaldi_fbank, kaldi_filters
from unimoe_jax.data.features.clip import image_pixels, square_image
from unimoe_jax.data.features.sound import chunk_starts, split_chunks
from unimoe_jax.data.features.whisper import log_mel
from unimoe_jax.data.media.images import load_image
from unimoe_jax.data.media.sounds import load_waveform, sound_length

RECORDED = "expected_uni.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(golden_dir("preprocessing") / RECORDED) as file:
        return dict(file)


def recorded_names(end: str) -> list[str]:
    """Media for which a key with this end was recorded."""
    with np.load(golden_dir("preprocessing") / RECORDED) as file:
        return sorted({key.split("/")[0] for key in file if split_key(key)[0].endswith(end)})


def media(name: str) -> str:
    (path,) = (golden_dir("preprocessing") / "media").glob(f"{name}.*")
    return str(path)


def find(golden, name: str) -> tuple[np.ndarray | None, int]:
    """(what was recorded as `name`, every how manyth row of it); None where nothing was."""
    found = [
        (value, split_key(key)[1]) for key, value in golden.items() if split_key(key)[0] == name
    ]
    assert len(found) <= 1, name
    return found[0] if found else (None, 1)


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("name", recorded_names("/uint8_chw"))
def test_images_equal_clip_image_processor(golden, name, aspect):
    image, compared = load_image(media(name)), 0
    for size in (56, 336):
        expected, step = find(golden, f"{name}/{aspect}/{size}/uint8_chw")
        if expected is not None:
            pixels = square_image(image, size, aspect).transpose(2, 0, 1)
            assert pixels.shape == (3, size, size)
            np.testing.assert_array_equal(thin(pixels, step), expected)
            compared += 1
        expected, step = find(golden, f"{name}/{aspect}/{size}/pixel_values")
        if expected is not None:
            got = image_pixels(image, size, aspect)
            assert got.dtype == np.float32
            got = thin(got.transpose(2, 0, 1), step)
            np.testing.assert_allclose(got, expected, atol=1e-5, strict=True)
            compared += 1
    assert compared > 1


@pytest.mark.parametrize("name", recorded_names("/num_chunks"))
def test_waveforms_and_log_mel_equal_the_reference(golden, name):
    wave = load_waveform(media(name))
    assert sound_length(media(name)) == len(wave)
    if f"{name}/waveform16k" in golden:
        np.testing.assert_allclose(wave, golden[f"{name}/waveform16k"], atol=1e-5)
    else:
        assert len(wave) == golden[f"{name}/waveform16k_len"]
        recorded = golden[f"{name}/waveform16k_head_tail"]
        half = len(recorded) // 2
        ends = np.concatenate([wave[:half], wave[-half:]])
        np.testing.assert_allclose(ends, recorded, atol=1e-5)
    chunks = split_chunks(wave, 480_000, "reference", 20)
    assert len(chunks) == golden[f"{name}/num_chunks"]
    for number, chunk in enumerate(chunks):
        mel = log_mel(chunk, 80, 3000)
        assert mel.shape == (80, 3000)
        assert mel.dtype == np.float32
        key = f"{name}/chunk{number}"
        expected, step = find(golden, f"{key}/log_mel_first100_last100")
        if expected is not None:
            both = np.concatenate([mel[:, :100], mel[:, -100:]], axis=1)
            np.testing.assert_allclose(thin(both, step), expected, atol=1e-4)
            continue
        first, step = find(golden, f"{key}/log_mel_first_frames")
        np.testing.assert_allclose(thin(mel[:, : first.shape[1]], step), first, atol=1e-4)
        rest = mel[:, first.shape[1] :]
        np.testing.assert_allclose(rest, golden[f"{key}/log_mel_pad_value"][0], atol=1e-4)


@pytest.mark.parametrize("name", recorded_names("/fbank_raw_unpadded"))
def test_fbank_equals_torchaudio(golden, name):
    wave = load_waveform(media(name))
    filters = golden["kaldi_mel_banks_128"]
    np.testing.assert_allclose(kaldi_filters(128).T, filters, atol=2e-5)
    raw = kaldi_fbank(wave, 128)
    # 25 ms windows every 10 ms that lie in the sound.
    assert raw.shape == ((len(wave) - 400) // 160 + 1, 128)
    expected, step = find(golden, f"{name}/fbank_raw_unpadded")
    np.testing.assert_allclose(thin(raw, step), expected, atol=5e-3)
    padded = beats_fbank(wave, 480_000, 128)
    assert padded.shape == tuple(golden[f"{name}/fbank_norm_padded30s_shape"])
    first, step = find(golden, f"{name}/fbank_norm_padded30s_first_frames")
    end = len(first) * step
    np.testing.assert_allclose(thin(padded[:end], step), first, atol=5e-3)
    tail = golden[f"{name}/fbank_norm_padded30s_tail_value"]
    np.testing.assert_allclose(padded[end:], tail[None].repeat(2998 - end, 0), atol=1e-5)


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
