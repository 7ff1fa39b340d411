"""Log-mel spectrograms as Whisper reads them; constants and steps of WhisperFeatureExtractor."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from unimoe_jax.data.features.sound import HOP, WINDOW, apply_filters
from unimoe_jax.data.media.sounds import SAMPLE_RATE


@lru_cache
def slaney_filters(mel_bins: int, n_fft: int = WINDOW) -> np.ndarray:
    """Slaney mel filters with Slaney norm, 0 to 8000 Hz: float64 [n_fft // 2 + 1, mel_bins]."""
    highest = _hz_to_slaney(np.array(SAMPLE_RATE / 2))
    # Filter i rises from edge i to edge i + 1 and falls to edge i + 2.
    edges = _slaney_to_hz(np.linspace(0, highest, mel_bins + 2))
    frequencies = np.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)
    slopes = edges[None, :] - frequencies[:, None]
    width = np.diff(edges)
    rising, falling = -slopes[:, :-2] / width[:-1], slopes[:, 2:] / width[1:]
    filters = np.maximum(0, np.minimum(rising, falling))
    # Slaney norm: all filters have the same area.
    return filters * (2.0 / (edges[2:] - edges[:-2]))


def _hz_to_slaney(hz: np.ndarray) -> np.ndarray:
    """Hz -> mel: linear below 1 kHz (3/200 mel per Hz), logarithmic above (27 mel per factor of
    6.4)."""
    logarithmic = 15 + np.log(np.maximum(hz, 1000) / 1000) * (27 / np.log(6.4))
    return np.where(hz < 1000, hz * 3 / 200, logarithmic)


def _slaney_to_hz(mel: np.ndarray) -> np.ndarray:
    """Inverse of `_hz_to_slaney`."""
    logarithmic = 1000 * np.exp((mel - 15) * (np.log(6.4) / 27))
    return np.where(mel < 15, mel * 200 / 3, logarithmic)


def log_mel(wave: np.ndarray, mel_bins: int, frames: int) -> np.ndarray:
    """Whisper's features of one chunk: float32 [samples] -> float32 [mel_bins, frames].

    The chunk is zero-padded to frames * 160 samples; Hann window of 400, reflect padding, power
    spectrum, log10 with a floor of 1e-10 and of the chunk's maximum - 8, then (x + 4) / 4.
    """
    total = frames * HOP
    # Frames that see only padding all equal the floor, so compute only those before them.
    used = min(frames, (len(wave) + WINDOW // 2) // HOP + 1)
    padded = np.zeros(total, np.float64)
    padded[: len(wave)] = wave[:total]
    padded = np.pad(padded, WINDOW // 2, mode="reflect")
    # Power spectrum of every window.
    windows = sliding_window_view(padded, WINDOW)[::HOP][:used]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(windows * hann)) ** 2
    # Logarithms, and both floors.
    mel = np.full((mel_bins, frames), -10.0)
    mel[:, :used] = np.log10(np.maximum(apply_filters(power, slaney_filters(mel_bins)), 1e-10)).T
    mel = np.maximum(mel, mel.max() - 8.0)
    return ((mel + 4.0) / 4.0).astype(np.float32)
