"""Filter banks as BEATs reads them: the steps of torchaudio's `compliance.kaldi.fbank`."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from unimoe_jax.data.features.sound import HOP, WINDOW, apply_filters
from unimoe_jax.data.media.sounds import SAMPLE_RATE

BEATS_MEAN, BEATS_STD = 15.41663, 6.55582
"""BEATs subtracts this mean from its filter banks and divides by twice this deviation."""
FLOAT32_EPS = np.float32(1.1920929e-07)


@lru_cache
def kaldi_filters(mel_bins: int, n_fft: int = 512, low: float = 20.0) -> np.ndarray:
    """Triangular filters from `low` Hz to 8000 Hz, linear in 1127 ln(1 + f / 700): float32
    [n_fft // 2, mel_bins]."""

    def to_mel(hz):
        return 1127.0 * np.log(1.0 + np.asarray(hz, np.float64) / 700.0)

    # Filter i rises from edge i to edge i + 1 and falls to edge i + 2.
    edges = np.linspace(to_mel(low), to_mel(SAMPLE_RATE / 2), mel_bins + 2)
    mel = to_mel(SAMPLE_RATE / n_fft * np.arange(n_fft // 2))[:, None]
    rising = (mel - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def kaldi_fbank(wave: np.ndarray, mel_bins: int) -> np.ndarray:
    """Log filter-bank energies: float32 [samples] -> float32 [1 + (samples - 400) // 160, bins].

    The waveform is scaled by 2^15; per frame: mean removed, pre-emphasis 0.97, Povey window
    (Hann^0.85), 512-point power spectrum, natural logarithm with a floor of float32 epsilon.
    """
    windows = sliding_window_view(wave.astype(np.float32) * np.float32(32768), WINDOW)[::HOP]
    windows = windows - windows.mean(axis=1, keepdims=True)
    # Pre-emphasis; the first sample of a window also counts as the sample before it.
    previous = np.concatenate([windows[:, :1], windows[:, :-1]], axis=1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / (WINDOW - 1))
    emphasised = (windows - np.float32(0.97) * previous) * (hann**0.85).astype(np.float32)
    # The filters ignore the highest of the 257 frequencies.
    power = np.abs(np.fft.rfft(emphasised, 512)[:, :256]) ** 2
    energies = apply_filters(power.astype(np.float32), kaldi_filters(mel_bins))
    return np.log(np.maximum(energies, FLOAT32_EPS))


def beats_fbank(wave: np.ndarray, samples: int, mel_bins: int) -> np.ndarray:
    """BEATs features of one chunk: float32 [n <= samples] -> float32 [frames, mel_bins].

    The chunk is padded to `samples` with its last value, and the result is normalised by BEATs'
    constants.
    """
    frames = 1 + (samples - WINDOW) // HOP
    # Frames of padding are constant and so silent when their mean has been removed. They hold
    # log(eps) and are not computed.
    used = min(frames, -(-len(wave) // HOP))
    needed = (used - 1) * HOP + WINDOW
    padded = np.pad(wave, (0, max(0, needed - len(wave))), mode="edge")[:needed]
    fbank = np.full((frames, mel_bins), np.log(FLOAT32_EPS), np.float32)
    fbank[:used] = kaldi_fbank(padded, mel_bins)
    return (fbank - np.float32(BEATS_MEAN)) / np.float32(2 * BEATS_STD)
