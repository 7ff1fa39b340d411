"""Untrusted sound files: refused with a named reason, or read with a defined waveform."""

from __future__ import annotations

import numpy as np
import soundfile

from tests.data.media.helpers import assert_refused, write_video
from unimoe_jax.data.features.beats import beats_fbank
from unimoe_jax.data.features.whisper import log_mel
from unimoe_jax.data.media.sounds import LOUDEST, load_waveform, sound_length


def test_sound_of_many_kinds(folder):
    root = folder.root
    for name, settings in {
        "mono.wav": {},
        "stereo.flac": {"rate": 44100, "channels": 2},
        "low.wav": {"rate": 8000},
        "high.ogg": {"rate": 48000},
        "int16.wav": {"subtype": "PCM_16"},
    }.items():
        wave = load_waveform(str(root / folder.sound(name, 1.25, **settings)))
        assert wave.dtype == np.float32
        assert wave.shape == (20000,)
        assert 0.1 < np.abs(wave).max() < 0.4
        assert sound_length(str(root / name)) == 20000
    stereo = np.stack([np.full(16000, 0.5), np.full(16000, -0.1)], axis=1)
    soundfile.write(root / "two.wav", stereo, 16000, subtype="FLOAT")
    np.testing.assert_allclose(load_waveform(str(root / "two.wav")), 0.2, atol=1e-6)


def test_the_sound_track_of_a_video(folder):
    path = folder.root / "v.mp4"
    write_video(path, sound=True)
    wave = load_waveform(str(path))
    assert abs(len(wave) - 48000) < 2000
    assert 0.2 < np.abs(wave).max() < 0.4
    assert sound_length(str(path)) + 2000 > len(wave)


def test_refused_sound(folder):
    root = folder.root
    (root / "empty.wav").write_bytes(b"")
    (root / "text.mp3").write_text("<html>")
    folder.sound("none.wav", 0)
    folder.sound("blip.wav", 0.001)
    folder.sound("nan.wav", nan=True)
    assert_refused(load_waveform, root / "empty.wav", "unreadable_audio")
    assert_refused(load_waveform, root / "text.mp3", "unreadable_audio")
    assert_refused(load_waveform, root / "gone.wav", "missing_file")
    assert_refused(sound_length, root / "gone.wav", "missing_file")
    for load in (load_waveform, sound_length):
        assert_refused(load, root / "none.wav", "empty_audio")
        assert_refused(load, root / "blip.wav", "empty_audio")
    assert_refused(load_waveform, root / "nan.wav", "nan_audio")
    for value in (3e38, 1e15):  # finite, but the power or the sum of two channels is not
        wave = np.full((16000, 2), value, np.float32)
        soundfile.write(root / "loud.wav", wave, 16000, subtype="FLOAT")
        assert_refused(load_waveform, root / "loud.wav", "loud_audio")


def test_the_loudest_sound_has_finite_features(folder):
    """White noise at the limit is the hardest case for every filter."""
    wave = np.random.default_rng(0).choice([-LOUDEST, LOUDEST], 44100).astype(np.float32)
    soundfile.write(folder.root / "loud.wav", wave, 44100, subtype="FLOAT")
    wave = load_waveform(str(folder.root / "loud.wav"))
    for features in (beats_fbank(wave, 32000, 16), log_mel(wave, 8, 200)):
        assert np.isfinite(features).all()


def test_sound_with_a_damaged_header(tmp_path, monkeypatch):
    """An unknown codec is a bad sample. A header that promises more samples than fit into memory
    does not matter: FFmpeg reads the file to its end."""
    file = tmp_path / "damaged.wav"
    soundfile.write(file, np.full(2000, 0.1), 16000)
    whole = file.read_bytes()
    file.write_bytes(whole[:20] + b"\x34\x12" + whole[22:])
    assert_refused(load_waveform, file, "unreadable_audio")
    file.write_bytes(whole)
    for error in (MemoryError("3.87 TiB"), ValueError("array is too big")):

        def read(*_, error=error, **__):
            raise error

        monkeypatch.setattr("unimoe_jax.data.media.sounds.soundfile.read", read)
        assert len(load_waveform(str(file))) == 2000
