"""Open audio and video containers with PyAV, with limits and clear errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Literal

from unimoe_jax.data.tally import BadSample

CONTAINER_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mp3,wav,flac,ogg,aac",
    "protocol_whitelist": "file",
}
"""Options for FFmpeg. A file of another format, such as a play list, could make FFmpeg open other
files or addresses."""


@contextmanager
def open_stream(
    path: str, kind: Literal["video", "audio"], decode: bool = True
) -> Iterator[tuple[Any, Any]]:
    """Open a file and its first video or audio stream: (PyAV's container, its stream).

    decode: the caller decodes the stream, so its codec must be known; False: it reads the header.
    Every error of FFmpeg, here or in the block, becomes a `BadSample`: missing_file,
    unreadable_video or unreadable_audio.
    """
    av = import_av()
    reason = f"unreadable_{kind}"
    try:
        with _open_container(path) as container:
            streams = container.streams.video if kind == "video" else container.streams.audio
            if not streams:
                missing = "video stream" if kind == "video" else "sound track"
                raise BadSample(reason, f"{path}: no {missing}")
            if decode and streams[0].codec_context is None:
                raise BadSample(reason, f"{path}: its codec is not known")
            yield container, streams[0]
    except FileNotFoundError as error:
        raise BadSample("missing_file", f"no such file: {path}") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadSample(reason, f"{path}: cannot be read as {kind} ({error})") from error


def _open_container(path: str) -> Any:
    """Open a file with PyAV.

    Raises ValueError for a format that is not listed, FFmpeg's errors, and OSErrors.
    """
    av = import_av()
    try:
        return av.open(path, options=CONTAINER_OPTIONS)
    # FFmpeg only says "invalid argument" of a format that is not in the list.
    except av.ArgumentError as error:
        formats = CONTAINER_OPTIONS["format_whitelist"].replace(",", ", ")
        raise ValueError(f"its format is not one of {formats}") from error


def duration_seconds(container: Any, stream: Any, rate: Fraction) -> float:
    """Duration of a video stream: from its header, else from that of the container, else from its
    number of frames at `rate` Hz.

    Raises ValueError if the file has none of them.
    """
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / 1e6  # it is in microseconds
    if stream.frames:
        return float(stream.frames / rate)
    raise ValueError("unknown duration")


def import_av() -> Any:
    """Return the module `av`, which is imported when the first container is opened."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "reading video files and compressed containers needs PyAV: pip install av"
        ) from error
    return av
