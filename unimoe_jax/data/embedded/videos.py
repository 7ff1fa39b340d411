"""Two-second videos of a swaying shape, steady or blinking, with a sound event as sound track.

A model may average its frames and so lose their order. Colour, shape and blinking can still be seen
then: the mean of a blinking shape is half as bright.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.container import OutputContainer

from unimoe_jax.data.embedded import images, sounds

FRAMES, FPS = 16, 8
# AAC works in blocks of 1024 samples and adds one; 28 blocks stay below two seconds.
SOUNDTRACK = 28 * 1024 / sounds.RATE  # seconds

LIGHTS = ("steady", "blinking")


def codec() -> str:
    """Name of the video encoder: H.264 if FFmpeg was built with it, otherwise MPEG-4 part 2."""
    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


def animate(labels: dict[str, str], rng: np.random.Generator) -> np.ndarray:
    """Frames of the labels `colour`, `shape`, `light`: uint8 [16, 48, 48, 3]."""
    start = images.place(rng, 12.0, 16.0)
    # A model that reads eight frames sees every second one. The light changes every two frames, so
    # half of the frames that the model sees are dark.
    lit = np.arange(FRAMES) // 2 % 2 == rng.integers(2)
    if labels["light"] == "steady":
        lit[:] = True
    # The shape sways along a diagonal, about once per video.
    angle = 2 * np.pi * rng.uniform(0.75, 1.1) * np.arange(FRAMES) / FRAMES + rng.uniform(0, 6.3)
    colour, ground = images.tint(labels["colour"], rng), images.ground(rng)
    frames = []
    for offset, on in zip(3 * np.sin(angle), lit, strict=True):
        placing = start._replace(x=start.x + offset, y=start.y + offset)
        mask = on * images.coverage(labels["shape"], placing)
        frames.append(images.paint(mask, colour, ground, rng, noise=5.0))
    return np.stack(frames)


def _video_stream(container: OutputContainer) -> av.VideoStream:
    """Add a video stream, encoded so that the same frames always give the same bytes."""
    options = {"threads": "1"}
    if codec() == "libx264":
        # The vector code of x264 is switched off: it reads beyond rows as narrow as these, and one
        # file in some hundreds was different.
        options |= {"crf": "16", "preset": "veryfast", "bf": "0", "x264-params": "no-asm=1"}
    stream = cast(av.VideoStream, container.add_stream(codec(), rate=FPS, options=options))
    stream.width = stream.height = images.SIZE
    stream.pix_fmt = "yuv420p"
    if codec() == "mpeg4":
        stream.bit_rate = 200_000
    return stream


def _audio_frames(signal: np.ndarray, block: int = 1024) -> Iterator[av.AudioFrame]:
    """Cut float [samples] into planar float frames of one encoder block each."""
    for start in range(0, len(signal), block):
        data = np.ascontiguousarray(signal[None, start : start + block], np.float32)
        frame = av.AudioFrame.from_ndarray(data, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = sounds.RATE, start
        yield frame


def planar_yuv(pixels_HWC: np.ndarray) -> np.ndarray:
    """RGB uint8 [H, W, 3] -> Y, U, V planes as FFmpeg stacks them, uint8 [H·3/2, W] (ITU-R BT.601).

    FFmpeg's conversion is not used, because it reads the undefined bytes behind narrow rows: the
    same pixels would not always give the same file.
    """
    rgb = pixels_HWC.astype(np.float64) / 255
    luma = 16 + rgb @ (65.481, 128.553, 24.966)
    chroma = 128 + rgb @ np.array([(-37.797, 112.0), (-74.203, -93.786), (112.0, -18.214)])
    height, width = luma.shape
    # Each chroma value covers 2 x 2 pixels.
    halved = chroma.reshape(height // 2, 2, width // 2, 2, 2).mean((1, 3))
    planes = [luma, *(halved[..., plane].reshape(-1, width) for plane in (0, 1))]
    return np.rint(np.concatenate(planes)).astype(np.uint8)


def encode(path: Path, frames_FHWC: np.ndarray, signal: np.ndarray) -> None:
    """Write an MP4: frames uint8 at 8 per second, signal float [samples] as AAC at 16 kHz."""
    with av.open(str(path), "w", format="mp4") as container:
        video = _video_stream(container)
        audio = container.add_stream("aac", rate=sounds.RATE, layout="mono")
        audio.bit_rate = 48_000
        for index, pixels in enumerate(frames_FHWC):
            frame = av.VideoFrame.from_ndarray(planar_yuv(pixels), format="yuv420p")
            frame.pts = index
            container.mux(video.encode(frame))
        container.mux(video.encode(None))  # the frames that the encoder still holds
        for frame in _audio_frames(signal):
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def write(path: Path, labels: dict[str, str], rng: np.random.Generator) -> None:
    """Write an MP4 of the labels `colour`, `shape`, `light` and `sound`."""
    frames = animate(labels, rng)
    encode(path, frames, sounds.synthesise(labels["sound"], SOUNDTRACK, rng))
