"""Sound files to waveforms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import soundfile
import soxr

from unimoe_jax.data.media.containers import import_av, open_container
from unimoe_jax.data.tally import BadSample

SAMPLE_RATE = 16000
MIN_SAMPLES = 400
LOUDEST = 2.0**31


def load_waveform(path: str) -> np.ndarray:
    """Mono float32 [samples] at 16 kHz; the sound track of a video file too.

    Channels are averaged, other rates resampled by soxr HQ to ceil(n * 16000 / rate) samples.
    Raises `BadSample`: missing_file, unreadable_audio, empty_audio, nan_audio, loud_audio.
    """
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    # The last two: a damaged header promises more samples than any memory holds.
    except (soundfile.LibsndfileError, OSError, MemoryError, ValueError) as error:
        if not Path(path).is_file():
            raise BadSample("missing_file", f"no such file: {path}") from error
        wave, rate = _decode_sound(path)
    peak = max(wave.max(initial=0), -wave.min(initial=0))  # NaN if any sample is
    if not np.isfinite(peak):
        raise BadSample("nan_audio", f"{path}: not all samples are finite")
    if peak > LOUDEST:
        raise BadSample(
            "loud_audio", f"{path}: samples reach {peak:.1e}; sound lies between -1 and 1"
        )
    mono = wave.mean(axis=1, dtype=np.float32)
    length = resampled_length(len(mono), rate)
    if length < MIN_SAMPLES:
        raise BadSample("empty_audio", f"{path}: {len(mono)} samples at {rate} Hz are too few")
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    return np.pad(mono[:length], (0, max(0, length - len(mono))))


def resampled_length(samples: int, rate: int) -> int:
    """Samples after resampling to 16 kHz."""
    return samples if rate == SAMPLE_RATE else math.ceil(samples * (SAMPLE_RATE / rate))


def sound_length(path: str) -> int:
    """Samples at 16 kHz according to the header, without decoding (an upper bound for containers).

    Raises `BadSample` as `load_waveform` does, except for what only decoding can show.
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
    av = import_av()
    try:
        with open_container(path) as container:
            if not container.streams.audio:
                raise BadSample("unreadable_audio", f"{path}: no sound track")
            stream = container.streams.audio[0]
            seconds = stream.duration and float(stream.duration * stream.time_base)
            if not seconds:
                seconds = (container.duration or 0) / 1e6
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadSample("unreadable_audio", f"{path}: cannot be read as sound ({error})") from error
    return math.ceil(seconds * SAMPLE_RATE) if seconds else len(load_waveform(path))


def _decode_sound(path: str) -> tuple[np.ndarray, int]:
    """[samples, channels] float32 and the rate, through FFmpeg."""
    av = import_av()
    try:
        with open_container(path) as container:
            if not container.streams.audio:
                raise BadSample("unreadable_audio", f"{path}: no sound track")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise BadSample("unreadable_audio", f"{path}: its codec is not known")
            rate = stream.rate
            resampler = av.AudioResampler(format="fltp", rate=rate)
            blocks = [
                block.to_ndarray()
                for frame in [*container.decode(stream), None]
                for block in resampler.resample(frame)
            ]
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadSample("unreadable_audio", f"{path}: cannot be read as sound ({error})") from error
    if not blocks:
        raise BadSample("empty_audio", f"{path}: no sound could be decoded")
    return np.concatenate(blocks, axis=1).T.astype(np.float32), rate
