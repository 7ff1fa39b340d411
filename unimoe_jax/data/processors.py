"""A media file -> the pool entries of a batch, by the settings of one model. Pure numpy.

`media` decodes the file and `features` computes what the encoder reads: CLIP pixels, Whisper's
log-mel spectrograms or BEATs' filter banks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unimoe_jax.config import AudioConfig, ModelConfig, SpeechConfig, VisionConfig
from unimoe_jax.config.media import MediaName
from unimoe_jax.data.features.beats import beats_fbank
from unimoe_jax.data.features.clip import image_pixels
from unimoe_jax.data.features.sound import chunk_starts, split_chunks
from unimoe_jax.data.features.whisper import log_mel
from unimoe_jax.data.media.images import DEFAULT_LIMITS, ImageLimits, load_image
from unimoe_jax.data.media.sounds import SAMPLE_RATE, load_waveform, sound_length
from unimoe_jax.data.media.videos import load_frames
from unimoe_jax.data.records import MediaFile


class Entries(NamedTuple):
    """The pool entries of one file.

    arrays: one per pool entry; lengths: valid samples of each (sound only); found: entries the
    file has, more than len(arrays) if `max_chunks` cut it.
    """

    arrays: list[np.ndarray]
    lengths: list[int]
    found: int


class _Chunking(NamedTuple):
    """How a sound is cut: chunks of at most `size` samples, at most `max_chunks` of them."""

    size: int
    stride: str
    max_chunks: int


class Processors:
    """Reads media files for one model. Picklable, stateless, raises `BadSample`.

    A file's modality must be one that the model has an encoder for (`RecordReader` checks this).
    """

    def __init__(self, model: ModelConfig, limits: ImageLimits = DEFAULT_LIMITS):
        self.model = model
        self.limits = limits

    def load(self, file: MediaFile) -> Entries:
        """Decode a file: its pool entries, in the layout of `Batch`."""
        if file.modality == "image":
            vision = self._vision()
            image = load_image(file.paths[0], self.limits)
            size = vision.encoder.image_size
            return Entries([image_pixels(image, size, vision.aspect)], [0], 1)
        if file.modality == "video":
            # All frames of a video are one pool entry.
            vision = self._vision()
            size = vision.encoder.image_size
            frames = load_frames(file.paths, vision.frames, self.limits)
            pixels = [image_pixels(frame, size, vision.aspect) for frame in frames]
            return Entries([np.stack(pixels)], [0], 1)
        return self._sound(file.modality, load_waveform(file.paths[0]))

    def count(self, file: MediaFile) -> tuple[int, int]:
        """(pool entries, entries before `max_chunks`) from the header, without decoding.

        Example: a sound of 70 s in chunks of 30 s with `max_chunks` 2 gives (2, 3).
        """
        if file.modality in ("image", "video"):
            return 1, 1
        chunking = self._chunking(file.modality)
        samples = sound_length(file.paths[0])
        in_file = len(chunk_starts(samples, chunking.size, chunking.stride))
        return min(in_file, chunking.max_chunks), in_file

    def _sound(self, modality: MediaName, wave: np.ndarray) -> Entries:
        """The features of each chunk of a waveform float32 [samples]."""
        chunking = self._chunking(modality)
        chunks = split_chunks(wave, chunking.size, chunking.stride, chunking.max_chunks)
        if modality == "speech":
            speech = self._speech()
            bins = speech.encoder.mel_bins
            arrays = [log_mel(chunk, bins, speech.num_frames) for chunk in chunks]
        else:
            bins = self._audio().encoder.mel_bins
            arrays = [beats_fbank(chunk, chunking.size, bins) for chunk in chunks]
        # Count the chunks before `max_chunks`, so that a caller can report how many were dropped.
        in_file = len(chunk_starts(len(wave), chunking.size, chunking.stride))
        return Entries(arrays, [len(chunk) for chunk in chunks], in_file)

    def _chunking(self, modality: MediaName) -> _Chunking:
        if modality == "speech":
            speech = self._speech()
            size = speech.chunk_seconds * SAMPLE_RATE
            return _Chunking(size, speech.chunk_stride, speech.max_chunks)
        audio = self._audio()
        return _Chunking(audio.num_samples, "exact", audio.max_chunks)

    # The branches of the model, which are there because its encoders accepted the file.

    def _vision(self) -> VisionConfig:
        assert self.model.vision is not None, "an image for a model without vision"
        return self.model.vision

    def _speech(self) -> SpeechConfig:
        assert self.model.speech is not None, "speech for a model without a speech encoder"
        return self.model.speech

    def _audio(self) -> AudioConfig:
        assert self.model.audio is not None, "audio for a model without an audio encoder"
        return self.model.audio
