"""Video files, animated images and folders of frames -> RGB frames."""

from __future__ import annotations

import math
import os
from typing import Any

from PIL import Image, ImageOps

from unimoe_jax.data.media.containers import duration_seconds, import_av, open_stream
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

ANIMATED_FORMATS = ("GIF", "WEBP", "PNG")
"""Formats in which several frames are a film. The frames of a TIFF are pages, those of a JPEG (MPO)
are views."""
SEEK_SECONDS = 2.0
"""A frame that is further ahead than this is found faster by seeking than by decoding up to it."""


def load_frames(
    paths: tuple[str, ...], count: int, limits: ImageLimits = DEFAULT_LIMITS
) -> list[Image.Image]:
    """`count` RGB frames of a video: a file, a folder of frame images, or the images themselves.

    Frame i of a file is the one shown at i * step / fps with step = int(duration * fps) // count
    (the rule of the extraction helper that the original releases). Images, and the frames of an
    animated image, are chosen by the same rule from their number alone (see `frame_numbers`).
    Raises `BadSample`: unreadable_video, missing_file and the reasons of `load_image`.
    """
    images = frame_files(paths)
    if images:
        return [load_image(images[i], limits) for i in frame_numbers(len(images), count)]
    if os.path.isdir(paths[0]):
        raise BadSample("unreadable_video", f"{paths[0]}: a video folder without images")
    decode = _animation_frames if _is_animated(paths[0]) else _decode_frames
    return decode(paths[0], count, limits)


def frame_files(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Return the images of a video that is given as a folder of frames or as the frames; else ().

    A single animated image is a video file, so it also gives ().

    Raises `BadSample`: unreadable_video.
    """
    path = paths[0]
    if len(paths) > 1:
        return paths
    if os.path.isdir(path):
        try:
            names = sorted(n for n in os.listdir(path) if n.lower().endswith(IMAGE_SUFFIXES))
        except OSError as error:
            raise BadSample("unreadable_video", f"{path}: {error.strerror or error}") from error
        return tuple(os.path.join(path, name) for name in names)
    is_frame = path.lower().endswith(IMAGE_SUFFIXES) and not _is_animated(path)
    return paths if is_frame else ()


def frame_numbers(total: int, count: int) -> list[int]:
    """Which of `total` frames to read: every (total // count)-th; repeated if there are too few.

    Example: 4 of 33 frames are 0, 8, 16, 24; 4 of 2 frames are 0, 0, 1, 1.
    """
    step = total // count
    return [i * step for i in range(count)] if step else [i * total // count for i in range(count)]


def _is_animated(path: str) -> bool:
    """Whether an image has a second frame.

    A second frame that is broken counts too; the function that reads it reports the fault.
    """
    opened = False
    try:
        with open_image(path, ANIMATED_FORMATS) as image:
            opened = True
            return getattr(image, "is_animated", False)
    except BadSample:
        return opened


def _animation_frames(path: str, count: int, limits: ImageLimits) -> list[Image.Image]:
    """`count` frames of an animated image."""
    with open_image(path, ANIMATED_FORMATS) as image:
        # A PNG may begin with a picture for programs that cannot show its frames.
        first = int(getattr(image, "default_image", False))
        numbers = frame_numbers(getattr(image, "n_frames", 1) - first, count)
        frames: dict[int, Image.Image] = {}
        # Visit every frame, because Pillow decodes all frames before the one asked for. A frame of
        # a GIF may enlarge the picture, and no frame may be decoded before its size is checked.
        for number in range(numbers[-1] + 1):
            image.seek(first + number)
            check_image_size(path, image.size, limits)
            if number in numbers:
                frames[number] = to_rgb(ImageOps.exif_transpose(image))
        return [frames[number] for number in numbers]


def _decode_frames(path: str, count: int, limits: ImageLimits) -> list[Image.Image]:
    """`count` frames of a video file."""
    with open_stream(path, "video") as (container, stream):
        stream.codec_context.thread_count = 1  # loader threads run in parallel already
        # Check the size from the header, before anything is decoded.
        size = (stream.codec_context.width, stream.codec_context.height)
        check_image_size(path, size, limits)
        # The number of frames follows from duration and rate, as in the original.
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise BadSample("unreadable_video", f"{path}: unknown frame rate")
        total = int(duration_seconds(container, stream, rate) * rate) or stream.frames
        if total < 1:
            raise BadSample("unreadable_video", f"{path}: no frames")
        times = [float(number / rate) for number in frame_numbers(total, count)]
        # Times in a file may be rounded, so a frame may come up to half a frame early.
        return _frames_at(container, stream, times, tolerance=0.5 / float(rate))


def _frames_at(
    container: Any, stream: Any, times: list[float], tolerance: float
) -> list[Image.Image]:
    """The first frame at or after each time (ascending, in seconds), to within `tolerance`; after
    the end of the video, its last frame."""
    origin = float((stream.start_time or 0) * stream.time_base)
    images: list[Image.Image] = []
    frame, frame_time, image = None, -math.inf, None
    decoded = container.decode(stream)
    # One converter for all frames, because setting it up is slow.
    converter = import_av().video.reformatter.VideoReformatter()
    for time in times:
        if time > frame_time + SEEK_SECONDS:
            # Seeking goes to the last key frame before the time.
            container.seek(int((time + origin) / stream.time_base), stream=stream)
            decoded = container.decode(stream)
        # Decode up to the time, or to the end.
        while frame is None or frame_time < time - tolerance:
            next_frame = next(decoded, None)
            if next_frame is None:
                break
            frame, image = next_frame, None
            frame_time = float(frame.time or 0.0) - origin
        if frame is None:
            raise ValueError("no frame could be decoded")
        # A frame that is shown at several of the times is converted once.
        if image is None:
            image = Image.fromarray(converter.reformat(frame, format="rgb24").to_ndarray())
        images.append(image)
    return images
