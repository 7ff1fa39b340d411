"""Files -> RGB images, video frames and 16 kHz waveforms, with untrusted input in mind.

Only listed formats are opened, sizes are checked before pixels are decoded, and whatever a decoder
says about a broken file becomes a `BadSample` that names it.
"""

from __future__ import annotations

import math
import os

from PIL import Image, ImageOps

from unimoe_jax.data.media.containers import duration_seconds, import_av, open_container
from unimoe_jax.data.media.images import (
    DEFAULT_LIMITS,
    IMAGE_SUFFIXES,
    ImageLimits,
    check_image_size,
    load_image,
    open_image,
    to_rgb,
)
from unimoe_jax.data.tally import BadSample

"""One analysis window of 25 ms; shorter sound is rejected."""
"""Integers of 32 bits that nobody scaled to [-1, 1] still pass. No sound is louder, and from about
1e11 on the power of a frame overflows float32: BEATs' features would be infinite or NaN."""

ANIMATED_FORMATS = ("GIF", "WEBP", "PNG")
"""Where several frames are a film. Those of a TIFF are pages, those of a JPEG (MPO) are views."""


# --------------------------------------------------------------------------------- images


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
        with open_image(path, ANIMATED_FORMATS) as image:
            opened = True
            return image.is_animated
    except BadSample:
        return opened


def _animation_frames(path: str, count: int, limits: ImageLimits) -> list[Image.Image]:
    with open_image(path, ANIMATED_FORMATS) as image:
        # A PNG may begin with a picture for those that cannot show its frames.
        first = int(getattr(image, "default_image", False))
        numbers = frame_numbers(image.n_frames - first, count)
        shown: dict[int, Image.Image] = {}
        # One by one, as Pillow decodes all before the one asked for: a frame of a GIF may enlarge
        # the picture, and none is decoded before its size is checked.
        for number in range(numbers[-1] + 1):
            image.seek(first + number)
            check_image_size(path, image.size, limits)
            if number in numbers:
                shown[number] = to_rgb(ImageOps.exif_transpose(image))
        return [shown[number] for number in numbers]


def _decode_frames(path: str, count: int, limits: ImageLimits) -> list[Image.Image]:
    av = import_av()
    try:
        with open_container(path) as container:
            if not container.streams.video:
                raise BadSample("unreadable_video", f"{path}: no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadSample("unreadable_video", f"{path}: its codec is not known")
            stream.codec_context.thread_count = 1  # loader threads run side by side already
            size = (stream.codec_context.width, stream.codec_context.height)
            check_image_size(path, size, limits)
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise BadSample("unreadable_video", f"{path}: unknown frame rate")
            total = int(duration_seconds(container, stream, rate) * rate) or stream.frames
            if total < 1:
                raise BadSample("unreadable_video", f"{path}: no frames")
            times = [float(number / rate) for number in frame_numbers(total, count)]
            return _frames_at(container, stream, times, 0.5 / float(rate))
    except FileNotFoundError as error:
        raise BadSample("missing_file", f"no such file: {path}") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadSample("unreadable_video", f"{path}: {error}") from error


def _frames_at(container, stream, times: list[float], slack: float) -> list[Image.Image]:
    """The first frame at or after each time (ascending), the last one where the video is over."""
    origin = float((stream.start_time or 0) * stream.time_base)
    images: list[Image.Image] = []
    shown, shown_time, image = None, -math.inf, None
    decoded = container.decode(stream)
    convert = import_av().video.reformatter.VideoReformatter()  # one, as setting it up is slow
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
