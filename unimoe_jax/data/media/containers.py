"""Open media containers with PyAV, with limits and clear errors."""

from __future__ import annotations

from fractions import Fraction

CONTAINER_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mp3,wav,flac,ogg,aac",
    "protocol_whitelist": "file",
}


def duration_seconds(container, stream, rate: Fraction) -> float:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / 1e6
    if stream.frames:
        return float(stream.frames / rate)
    raise ValueError("unknown duration")


def open_container(path: str):
    """The opened file. Raises ValueError for a format that is not listed, FFmpeg's and OSErrors."""
    av = import_av()
    try:
        return av.open(path, options=CONTAINER_OPTIONS)
    except av.ArgumentError as error:  # all that FFmpeg says of such a format
        listed = CONTAINER_OPTIONS["format_whitelist"].replace(",", ", ")
        raise ValueError(f"its format is not one of {listed}") from error


def import_av():
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "reading video files and compressed containers needs PyAV: pip install av"
        ) from error
    return av
