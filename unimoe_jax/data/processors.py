"""Decoded media -> what encoders read: CLIP pixels, Whisper log-mel, kaldi fbank. Pure numpy.

Constants and steps: CLIPImageProcessor (PIL path), WhisperFeatureExtractor, and torchaudio's
`compliance.kaldi.fbank` as BEATs calls it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from unimoe_jax.config import ModelConfig
from unimoe_jax.data.media import (
    DEFAULT_LIMITS,
    SAMPLE_RATE,
    ImageLimits,
    load_frames,
    load_image,
    load_waveform,
    sound_length,
)
from unimoe_jax.data.records import MediaFile

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
BEATS_MEAN, BEATS_STD = 15.41663, 6.55582
WINDOW, HOP = 400, 160
BLAS_ROWS = 8
FLOAT32_EPS = np.float32(1.1920929e-07)

# --------------------------------------------------------------------------------- images


def square_image(image: Image.Image, size: int, aspect: str) -> np.ndarray:
    """RGB image -> uint8 [size, size, 3].

    aspect "square": shortest edge to `size` (bicubic), centre crop. "pad": first paste on a square
    of CLIP's mean colour.
    """
    width, height = image.size
    if aspect == "pad" and width != height:
        side = max(width, height)
        colour = tuple(int(value * 255) for value in CLIP_MEAN)
        canvas = Image.new("RGB", (side, side), colour)
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image, (width, height) = canvas, canvas.size
    if width <= height:
        new = (size, int(size * height / width))
    else:
        new = (int(size * width / height), size)
    image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def image_pixels(image: Image.Image, size: int, aspect: str) -> np.ndarray:
    """RGB image -> normalised float32 [size, size, 3]."""
    return (square_image(image, size, aspect) / np.float32(255) - CLIP_MEAN) / CLIP_STD


# ---------------------------------------------------------------------------------- sound


def chunk_starts(samples: int, size: int, stride: str) -> list[int]:
    """Where the chunks of at most `size` samples begin.

    stride "reference": a chunk that is followed by another skips one sample after itself, as
    Uni-MoE's speech loader does.
    """
    step = size + (stride == "reference")
    return list(range(0, samples, step)) if samples > size else [0]


def split_chunks(wave: np.ndarray, size: int, stride: str, most: int) -> list[np.ndarray]:
    """[samples] -> at most `most` chunks of at most `size` samples."""
    return [wave[start : start + size] for start in chunk_starts(len(wave), size, stride)[:most]]


def _filtered(power: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """power @ filters in blocks so small that BLAS stays on this thread.

    Loader threads run side by side; BLAS threads on top of them only get in each other's way.
    """
    whole = len(power) // BLAS_ROWS * BLAS_ROWS
    blocks = power[:whole].reshape(-1, BLAS_ROWS, power.shape[1])
    head = np.matmul(blocks, filters).reshape(whole, filters.shape[1])
    return np.concatenate([head, power[whole:] @ filters])


@lru_cache
def slaney_filters(mel_bins: int, n_fft: int = WINDOW) -> np.ndarray:
    """Slaney mel filters with Slaney norm, 0 to 8000 Hz: float64 [n_fft // 2 + 1, mel_bins]."""
    top = _hz_to_slaney(np.array(SAMPLE_RATE / 2))
    edges = _slaney_to_hz(np.linspace(0, top, mel_bins + 2))
    frequencies = np.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)
    slopes = edges[None, :] - frequencies[:, None]
    width = np.diff(edges)
    rising, falling = -slopes[:, :-2] / width[:-1], slopes[:, 2:] / width[1:]
    filters = np.maximum(0, np.minimum(rising, falling))
    return filters * (2.0 / (edges[2:] - edges[:-2]))


def _hz_to_slaney(hz: np.ndarray) -> np.ndarray:
    """Linear below 1 kHz (3/200 mel per Hz), logarithmic above (27 mel per factor 6.4)."""
    logarithmic = 15 + np.log(np.maximum(hz, 1000) / 1000) * (27 / np.log(6.4))
    return np.where(hz < 1000, hz * 3 / 200, logarithmic)


def _slaney_to_hz(mel: np.ndarray) -> np.ndarray:
    logarithmic = 1000 * np.exp((mel - 15) * (np.log(6.4) / 27))
    return np.where(mel < 15, mel * 200 / 3, logarithmic)


def log_mel(wave: np.ndarray, mel_bins: int, frames: int) -> np.ndarray:
    """Whisper's features of one chunk: float32 [samples] -> float32 [mel_bins, frames].

    The chunk is zero-padded to frames * 160 samples; Hann window of 400, reflect padding, power
    spectrum, log10 floored at 1e-10 and at the chunk's maximum - 8, then (x + 4) / 4.
    """
    total = frames * HOP
    # Frames that see only padding all equal the floor; compute up to the last that does not.
    used = min(frames, (len(wave) + WINDOW // 2) // HOP + 1)
    padded = np.zeros(total, np.float64)
    padded[: len(wave)] = wave[:total]
    padded = np.pad(padded, WINDOW // 2, mode="reflect")
    windows = sliding_window_view(padded, WINDOW)[::HOP][:used]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(windows * hann)) ** 2
    mel = np.full((mel_bins, frames), -10.0)
    mel[:, :used] = np.log10(np.maximum(_filtered(power, slaney_filters(mel_bins)), 1e-10)).T
    mel = np.maximum(mel, mel.max() - 8.0)
    return ((mel + 4.0) / 4.0).astype(np.float32)


@lru_cache
def kaldi_filters(mel_bins: int, n_fft: int = 512, low: float = 20.0) -> np.ndarray:
    """Triangular filters, linear in 1127 ln(1 + f / 700): float32 [n_fft // 2, mel_bins]."""

    def to_mel(hz):
        return 1127.0 * np.log(1.0 + np.asarray(hz, np.float64) / 700.0)

    edges = np.linspace(to_mel(low), to_mel(SAMPLE_RATE / 2), mel_bins + 2)
    mel = to_mel(SAMPLE_RATE / n_fft * np.arange(n_fft // 2))[:, None]
    rising = (mel - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def kaldi_fbank(wave: np.ndarray, mel_bins: int) -> np.ndarray:
    """Log filter-bank energies: float32 [samples] -> float32 [1 + (samples - 400) // 160, bins].

    The waveform is scaled by 2^15; per frame: mean removed, pre-emphasis 0.97, Povey window
    (Hann^0.85), 512-point power spectrum, natural logarithm floored at float32 epsilon.
    """
    windows = sliding_window_view(wave.astype(np.float32) * np.float32(32768), WINDOW)[::HOP]
    windows = windows - windows.mean(axis=1, keepdims=True)
    previous = np.concatenate([windows[:, :1], windows[:, :-1]], axis=1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / (WINDOW - 1))
    emphasised = (windows - np.float32(0.97) * previous) * (hann**0.85).astype(np.float32)
    power = np.abs(np.fft.rfft(emphasised, 512)[:, :256]) ** 2
    energies = _filtered(power.astype(np.float32), kaldi_filters(mel_bins))
    return np.log(np.maximum(energies, FLOAT32_EPS))


def beats_fbank(wave: np.ndarray, samples: int, mel_bins: int) -> np.ndarray:
    """BEATs features of one chunk: float32 [n <= samples] -> float32 [frames, mel_bins].

    The chunk is padded to `samples` with its last value; such frames are silent after the mean is
    removed, so they hold log(eps) and are not computed. Normalised by BEATs' constants.
    """
    frames = 1 + (samples - WINDOW) // HOP
    used = min(frames, -(-len(wave) // HOP))
    need = (used - 1) * HOP + WINDOW
    padded = np.pad(wave, (0, max(0, need - len(wave))), mode="edge")[:need]
    fbank = np.full((frames, mel_bins), np.log(FLOAT32_EPS), np.float32)
    fbank[:used] = kaldi_fbank(padded, mel_bins)
    return (fbank - np.float32(BEATS_MEAN)) / np.float32(2 * BEATS_STD)


# --------------------------------------------------------------------------- files to pools


class Entries(NamedTuple):
    """What one file puts into its pool.

    arrays: one per pool entry; lengths: valid samples of each (sound only); found: entries the
    file has, more than len(arrays) if `max_chunks` cut it.
    """

    arrays: list[np.ndarray]
    lengths: list[int]
    found: int


class Processors:
    """Reads media files for one model. Picklable, stateless, raises `BadSample`."""

    def __init__(self, model: ModelConfig, limits: ImageLimits = DEFAULT_LIMITS):
        self.model = model
        self.limits = limits

    def load(self, file: MediaFile) -> Entries:
        """The pool entries of a file, in the layout of `Batch`."""
        vision = self.model.vision
        if file.modality == "image":
            image = load_image(file.paths[0], self.limits)
            size = vision.encoder.image_size
            return Entries([image_pixels(image, size, vision.aspect)], [0], 1)
        if file.modality == "video":
            size = vision.encoder.image_size
            frames = load_frames(file.paths, vision.frames, self.limits)
            pixels = [image_pixels(frame, size, vision.aspect) for frame in frames]
            return Entries([np.stack(pixels)], [0], 1)
        return self._sound(file.modality, load_waveform(file.paths[0]))

    def count(self, file: MediaFile) -> tuple[int, int]:
        """(pool entries, entries before `max_chunks`) from the header, without decoding."""
        if file.modality in ("image", "video"):
            return 1, 1
        size, stride, most = self._chunking(file.modality)
        found = len(chunk_starts(sound_length(file.paths[0]), size, stride))
        return min(found, most), found

    def _chunking(self, modality: str) -> tuple[int, str, int]:
        if modality == "speech":
            speech = self.model.speech
            return speech.chunk_seconds * SAMPLE_RATE, speech.chunk_stride, speech.max_chunks
        return self.model.audio.num_samples, "exact", self.model.audio.max_chunks

    def _sound(self, modality: str, wave: np.ndarray) -> Entries:
        size, stride, most = self._chunking(modality)
        chunks = split_chunks(wave, size, stride, most)
        if modality == "speech":
            speech = self.model.speech
            bins = speech.encoder.mel_bins
            arrays = [log_mel(chunk, bins, speech.num_frames) for chunk in chunks]
        else:
            bins = self.model.audio.encoder.mel_bins
            arrays = [beats_fbank(chunk, size, bins) for chunk in chunks]
        found = len(chunk_starts(len(wave), size, stride))
        return Entries(arrays, [len(chunk) for chunk in chunks], found)
