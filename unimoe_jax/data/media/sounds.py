"""Sound files, and sound tracks of videos -> waveforms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import soundfile
import soxr

from unimoe_jax.data.media.containers import import_av, open_stream
from unimoe_jax.data.tally import BadSample

SAMPLE_RATE = 16000
"""Samples per second of every waveform, in Hz."""
MIN_SAMPLES = 400
"""One analysis window of 25 ms; shorter sound is rejected."""
LOUDEST = 2.0**31
"""Largest absolute value of a sample. Integers of 32 bits that nobody scaled to [-1, 1] still pass.
No sound is louder, and from about 1e11 on the power of a frame overflows float32: BEATs' features
would be infinite or NaN."""


def load_waveform(path: str) -> np.ndarray:
    """Decode a sound file, or the sound track of a video: mono float32 [samples] at 16 kHz.

    Channels are averaged, other rates resampled by soxr HQ to ceil(n * 16000 / rate) samples.
    Raises `BadSample`: missing_file, unreadable_audio, empty_audio, nan_audio, loud_audio.
    """
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    # If a damaged header promises more samples than memory can hold, soundfile raises the last two.
    except (soundfile.LibsndfileError, OSError, MemoryError, ValueError) as error:
        if not Path(path).is_file():
            raise BadSample("missing_file", f"no such file: {path}") from error
        # FFmpeg reads more formats, and reads a damaged file to its end.
        wave, rate = _decode_sound(path)
    # The peak is NaN if any sample is.
    peak = max(wave.max(initial=0), -wave.min(initial=0))
    if not np.isfinite(peak):
        raise BadSample("nan_audio", f"{path}: not all samples are finite")
    if peak > LOUDEST:
        raise BadSample(
            "loud_audio",
            f"{path}: samples reach {peak:.1e}; samples of sound are between -1 and 1",
        )
    mono = wave.mean(axis=1, dtype=np.float32)
    length = resampled_length(len(mono), rate)
    if length < MIN_SAMPLES:
        raise BadSample("empty_audio", f"{path}: {len(mono)} samples at {rate} Hz are too few")
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    # soxr may return a sample more or less than this length.
    return np.pad(mono[:length], (0, max(0, length - len(mono))))


def resampled_length(samples: int, rate: int) -> int:
    """Number of samples after `samples` at `rate` Hz are resampled to 16 kHz.

    Example: 44100 samples at 44100 Hz become 16000; 100 samples at 44100 Hz become 37.
    """
    return samples if rate == SAMPLE_RATE else math.ceil(samples * (SAMPLE_RATE / rate))


def sound_length(path: str) -> int:
    """Samples at 16 kHz according to the header, without decoding (an upper bound for containers).

    Raises `BadSample` as `load_waveform` does, except for faults that only decoding can find.
    """
    try:
        info = soundfile.info(path)
        length = resampled_length(info.frames, info.samplerate)
    except (soundfile.LibsndfileError, OSError) as error:
        if not Path(path).is_file():
            raise BadSample("missing_file", f"no such file: {path}") from error
        length = _container_sound_length(path)
    if length < MIN_SAMPLES:
        raise BadSample("empty_audio", f"{path}: {length} samples at 16 kHz are too few")
    return length


def _container_sound_length(path: str) -> int:
    """Samples at 16 kHz of the sound track of a container, from its header if it says so."""
    with open_stream(path, "audio", decode=False) as (container, stream):
        seconds = stream.duration and float(stream.duration * stream.time_base)
        if not seconds:
            seconds = (container.duration or 0) / 1e6  # it is in microseconds
    # Without any duration in the header, only decoding finds the length.
    return math.ceil(seconds * SAMPLE_RATE) if seconds else len(load_waveform(path))


def _decode_sound(path: str) -> tuple[np.ndarray, int]:
    """Decode the first sound track with FFmpeg: float32 [samples, channels], and its rate in Hz."""
    av = import_av()
    with open_stream(path, "audio") as (container, stream):
        rate = stream.rate
        # The resampler only changes the sample format: planar floats, whatever the codec returns.
        resampler = av.AudioResampler(format="fltp", rate=rate)
        blocks = [
            block.to_ndarray()
            for frame in [*container.decode(stream), None]  # None flushes the resampler
            for block in resampler.resample(frame)
        ]
    if not blocks:
        raise BadSample("empty_audio", f"{path}: no sound could be decoded")
    return np.concatenate(blocks, axis=1).T.astype(np.float32), rate
