"""A video writer and a check of refusals for the tests of media files."""

from __future__ import annotations

import av
import numpy as np
import pytest

from unimoe_jax.data.tally import BadSample


def assert_refused(load, path, reason):
    """Check that `load(path)` raises a `BadSample` with this reason, and that it names the file."""
    with pytest.raises(BadSample) as caught:
        load(str(path))
    assert caught.value.reason == reason, caught.value.message
    assert str(path) in caught.value.message


def write_video(path, frames=30, rate=10, sound=False, size=(32, 32)):
    """Write a video whose brightness rises from frame to frame; sound: add 3 s of a tone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        track = container.add_stream("aac", rate=44100) if sound else None
        for number in range(frames):
            image = np.full((*size[::-1], 3), number * 255 // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
        if track:
            wave = (0.3 * np.sin(np.arange(44100 * 3) / 20)).astype(np.float32)
            for start in range(0, len(wave), 1024):
                block = wave[None, start : start + 1024]
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 44100, start
                container.mux(track.encode(frame))
            container.mux(track.encode(None))
