"""Files -> RGB images, video frames and 16 kHz waveforms, with untrusted input in mind.

Only listed formats are opened, sizes are checked before pixels are decoded, and whatever a decoder
says about a broken file becomes a `BadSample` that names it.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import soxr
from PIL import Image, ImageOps, UnidentifiedImageError

from unimoe_jax.data.tally import BadSample

SAMPLE_RATE = 16000
MIN_SAMPLES = 400
"""One analysis window of 25 ms; shorter sound is rejected."""
LOUDEST = 2.0**31
"""Integers of 32 bits that nobody scaled to [-1, 1] still pass. No sound is louder, and from about
1e11 on the power of a frame overflows float32: BEATs' features would be infinite or NaN."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ANIMATED_FORMATS = ("GIF", "WEBP", "PNG")
"""Where several frames are a film. Those of a TIFF are pages, those of a JPEG (MPO) are views."""
CONTAINER_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mp3,wav,flac,ogg,aac",
    "protocol_whitelist": "file",
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageLimits:
    """What is refused before decoding: more pixels, or a longer side over a shorter one."""

    max_pixels: int = 89_478_485
    max_aspect_ratio: float = 200


DEFAULT_LIMITS = ImageLimits()

# --------------------------------------------------------------------------------- images


def load_image(path: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The first frame of an image file, upright, as 8-bit RGB.

    Alpha is dropped, as in the originals; 16-bit grey is scaled (Pillow alone would clip it).
    Raises `BadSample`: missing_file, unreadable_image, image_too_large, aspect_ratio.
    """
    with _opened(path, IMAGE_FORMATS) as image:
        _check_size(path, image.size, limits)
        return _to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def _opened(path: str, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """An image file; what is wrong with it or, in the block, with its pixels is a `BadSample`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as image:
                yield image
    except FileNotFoundError as error:
        raise BadSample("missing_file", f"no such file: {path}") from error
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise BadSample("unreadable_image", f"{path}: not one of {formats}") from error
    # The last two: Pillow lets them pass where a later frame of a GIF breaks off.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
        raise BadSample("unreadable_image", f"{path}: {error}") from error


def _check_size(path: str, size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise BadSample(
            "image_too_large", f"{path}: {width}x{height} exceeds {limits.max_pixels} pixels"
        )
    if max(size) > limits.max_aspect_ratio * min(size):
        raise BadSample(
            "aspect_ratio", f"{path}: {width}x{height} exceeds 1:{limits.max_aspect_ratio:g}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(values.clip(0, 65535) / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of each palette with alpha
    return image.convert("RGB")


# ---------------------------------------------------------------------------------- video


def load_frames(
    paths: tuple[str, ...], count: int, limits: ImageLimits = DEFAULT_LIMITS
) -> list[Image.Image]:
    """`count` RGB frames of a video: a file, a folder of frame images, or the images themselves.

    Frame i of a file is the one shown at i * step / fps with step = int(duration * fps) // count
    (the released extraction helper); images, and the frames of an animated one, are chosen by the
    same rule from their number alone.
    Raises `BadSample`: unreadable_video, missing_file and those of `load_image`.
    """
    images = frame_files(paths)
    if images:
        return [load_image(images[i], limits) for i in frame_numbers(len(images), count)]
    if os.path.isdir(paths[0]):
        raise BadSample("unreadable_video", f"{paths[0]}: a video folder without images")
    decode = _animation_frames if _is_animated(paths[0]) else _decode_frames
    return decode(paths[0], count, limits)


def frame_files(paths: tuple[str, ...]) -> tuple[str, ...]:
    """The images of a video that is a folder of frames or the frames themselves, else ().

    An animated image alone is a video file.

    Raises `BadSample`: unreadable_video.
    """
    if len(paths) == 1 and os.path.isdir(paths[0]):
        try:
            names = sorted(n for n in os.listdir(paths[0]) if n.lower().endswith(IMAGE_SUFFIXES))
        except OSError as error:
            raise BadSample("unreadable_video", f"{paths[0]}: {error.strerror or error}") from error
        return tuple(os.path.join(paths[0], name) for name in names)
    if len(paths) > 1:
        return paths
    is_frame = paths[0].lower().endswith(IMAGE_SUFFIXES) and not _is_animated(paths[0])
    return paths if is_frame else ()


def frame_numbers(total: int, count: int) -> list[int]:
    """Which of `total` frames to read: every (total // count)-th; repeated if there are too few."""
    step = total // count
    return [i * step for i in range(count)] if step else [i * total // count for i in range(count)]


def _is_animated(path: str) -> bool:
    """Whether an image has a second frame, whole or broken: whoever reads it next says which."""
    opened = False
    try:
        with _opened(path, ANIMATED_FORMATS) as image:
            opened = True
            return image.is_animated
    except BadSample:
        return opened


def _animation_frames(path: str, count: int, limits: ImageLimits) -> list[Image.Image]:
    with _opened(path, ANIMATED_FORMATS) as image:
        # A PNG may begin with a picture for those that cannot show its frames.
        first = int(getattr(image, "default_image", False))
        numbers = frame_numbers(image.n_frames - first, count)
        shown: dict[int, Image.Image] = {}
        # One by one, as Pillow decodes all before the one asked for: a frame of a GIF may enlarge
        # the picture, and none is decoded before its size is checked.
        for number in range(numbers[-1] + 1):
            image.seek(first + number)
            _check_size(path, image.size, limits)
            if number in numbers:
                shown[number] = _to_rgb(ImageOps.exif_transpose(image))
        return [shown[number] for number in numbers]


def _decode_frames(path: str, count: int, limits: ImageLimits) -> list[Image.Image]:
    av = _av()
    try:
        with _container(path) as container:
            if not container.streams.video:
                raise BadSample("unreadable_video", f"{path}: no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadSample("unreadable_video", f"{path}: its codec is not known")
            stream.codec_context.thread_count = 1  # loader threads run side by side already
            size = (stream.codec_context.width, stream.codec_context.height)
            _check_size(path, size, limits)
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise BadSample("unreadable_video", f"{path}: unknown frame rate")
            total = int(_duration(container, stream, rate) * rate) or stream.frames
            if total < 1:
                raise BadSample("unreadable_video", f"{path}: no frames")
            times = [float(number / rate) for number in frame_numbers(total, count)]
            return _frames_at(container, stream, times, 0.5 / float(rate))
    except FileNotFoundError as error:
        raise BadSample("missing_file", f"no such file: {path}") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadSample("unreadable_video", f"{path}: {error}") from error


def _duration(container, stream, rate: Fraction) -> float:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / 1e6
    if stream.frames:
        return float(stream.frames / rate)
    raise ValueError("unknown duration")


def _frames_at(container, stream, times: list[float], slack: float) -> list[Image.Image]:
    """The first frame at or after each time (ascending), the last one where the video is over."""
    origin = float((stream.start_time or 0) * stream.time_base)
    images: list[Image.Image] = []
    shown, shown_time, image = None, -math.inf, None
    decoded = container.decode(stream)
    convert = _av().video.reformatter.VideoReformatter()  # one, as setting it up is slow
    for time in times:
        if time > shown_time + 2.0:  # nearer by a key frame than by decoding on
            container.seek(int((time + origin) / stream.time_base), stream=stream)
            decoded = container.decode(stream)
        while shown is None or shown_time < time - slack:
            frame = next(decoded, None)
            if frame is None:
                break
            shown, image = frame, None
            shown_time = float(frame.time or 0.0) - origin
        if shown is None:
            raise ValueError("no frame could be decoded")
        if image is None:
            image = Image.fromarray(convert.reformat(shown, format="rgb24").to_ndarray())
        images.append(image)
    return images


# ---------------------------------------------------------------------------------- sound


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
    av = _av()
    try:
        with _container(path) as container:
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
    av = _av()
    try:
        with _container(path) as container:
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


def _container(path: str):
    """The opened file. Raises ValueError for a format that is not listed, FFmpeg's and OSErrors."""
    av = _av()
    try:
        return av.open(path, options=CONTAINER_OPTIONS)
    except av.ArgumentError as error:  # all that FFmpeg says of such a format
        listed = CONTAINER_OPTIONS["format_whitelist"].replace(",", ", ")
        raise ValueError(f"its format is not one of {listed}") from error


def _av():
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "reading video files and compressed containers needs PyAV: pip install av"
        ) from error
    return av
