"""Decoded media -> what encoders read: CLIP pixels, Whisper log-mel, kaldi fbank. Pure numpy.

Constants and steps: CLIPImageProcessor (PIL path), WhisperFeatureExtractor, and torchaudio's
`compliance.kaldi.fbank` as BEATs calls it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unimoe_jax.config import ModelConfig
from unimoe_jax.data.features.beats import beats_fbank
from unimoe_jax.data.features.clip import image_pixels
from unimoe_jax.data.features.sound import chunk_starts, split_chunks
from unimoe_jax.data.features.whisper import log_mel
from unimoe_jax.data.media.images import DEFAULT_LIMITS, ImageLimits, load_image
from unimoe_jax.data.media.sounds import SAMPLE_RATE, load_waveform, sound_length
from unimoe_jax.data.media.videos import load_frames
from unimoe_jax.data.records import MediaFile

# --------------------------------------------------------------------------------- images


# ---------------------------------------------------------------------------------- sound


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
