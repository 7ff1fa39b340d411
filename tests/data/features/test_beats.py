"""Filter banks against the recorded outputs of torchaudio, as BEATs calls it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.features.recorded import find, media, recorded_names
from tests.golden_dir import thin
from unimoe_jax.data.features.beats import beats_fbank, kaldi_fbank, kaldi_filters
from unimoe_jax.data.media.sounds import load_waveform


@pytest.mark.parametrize("name", recorded_names("/fbank_raw_unpadded"))
def test_fbank_equals_torchaudio(golden, name):
    wave = load_waveform(media(name))
    filters = golden["kaldi_mel_banks_128"]
    np.testing.assert_allclose(kaldi_filters(128).T, filters, atol=2e-5)
    raw = kaldi_fbank(wave, 128)
    # One window of 25 ms every 10 ms, as many as fit into the sound.
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
