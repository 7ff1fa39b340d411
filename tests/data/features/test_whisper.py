"""Waveforms and log-mel spectrograms against the recorded outputs of Uni-MoE's speech loader."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.features.recorded import find, media, recorded_names
from tests.golden_dir import thin
from unimoe_jax.data.features.sound import split_chunks
from unimoe_jax.data.features.whisper import log_mel
from unimoe_jax.data.media.sounds import load_waveform, sound_length


@pytest.mark.parametrize("name", recorded_names("/num_chunks"))
def test_waveforms_and_log_mel_equal_the_reference(golden, name):
    # Some waveforms were recorded whole, the others as their length and both ends.
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
    # Likewise, some spectrograms were recorded as their first and last 100 frames, the others as
    # their first frames and the value of all frames of padding.
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
