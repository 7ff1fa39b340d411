"""Two-second videos of one shape that moves or stays, with a sound event as soundtrack.

A model may average its frames and so lose their order. Colour, shape and movement survive that:
a moving shape swings to and fro and leaves a smear along its path.
"""

from pathlib import Path

import av
import numpy as np

from unimoe_jax.data.embedded import images, sounds

FRAMES, FPS = 16, 8
# AAC works in blocks of 1024 samples and adds one; 28 blocks stay below two seconds.
SOUNDTRACK = 28 * 1024 / sounds.RATE  # seconds

MOVEMENTS: dict[str, tuple[int, int]] = {
    "sideways": (1, 0),
    "vertically": (0, 1),
    "not at all": (0, 0),
}


def codec() -> str:
    """The video encoder: H.264 where FFmpeg was built with it, otherwise MPEG-4 part 2."""
    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


def animate(labels: dict[str, str], rng: np.random.Generator) -> np.ndarray:
    """Frames of the labels `colour`, `shape`, `movement`: uint8 [16, 48, 48, 3]."""
    start = images.place(rng, 7.0, 9.5)
    dx, dy = MOVEMENTS[labels["movement"]]
    reach = images.SIZE / 2 - start.radius - 1
    swing = reach * rng.uniform(0.85, 1.0)
    angle = 2 * np.pi * rng.uniform(0.75, 1.1) * np.arange(FRAMES) / FRAMES + rng.uniform(0, 6.3)
    colour, ground = images.tint(labels["colour"], rng), images.ground(rng)
    centre = images.SIZE / 2
    frames = []
    for offset in swing * np.sin(angle):
        x = centre + offset if dx else start.x
        y = centre + offset if dy else start.y
        mask = images.coverage(labels["shape"], start._replace(x=x, y=y))
        frames.append(images.paint(mask, colour, ground, rng, noise=5.0))
    return np.stack(frames)


def _video_stream(container: av.container.OutputContainer) -> av.VideoStream:
    options = {"crf": "16", "preset": "veryfast", "bf": "0"} if codec() == "libx264" else {}
    stream = container.add_stream(codec(), rate=FPS, options={**options, "threads": "1"})
    stream.width = stream.height = images.SIZE
    stream.pix_fmt = "yuv420p"
    if codec() == "mpeg4":
        stream.bit_rate = 200_000
    return stream


def _audio_frames(signal: np.ndarray, block: int = 1024):
    """Cuts float [samples] into planar float frames of one encoder block each."""
    for start in range(0, len(signal), block):
        data = np.ascontiguousarray(signal[None, start : start + block], np.float32)
        frame = av.AudioFrame.from_ndarray(data, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = sounds.RATE, start
        yield frame


def encode(path: Path, frames_FHWC: np.ndarray, signal: np.ndarray) -> None:
    """Writes an MP4: frames uint8 at 8 per second, signal float [samples] as AAC at 16 kHz."""
    with av.open(str(path), "w", format="mp4") as container:
        video = _video_stream(container)
        audio = container.add_stream("aac", rate=sounds.RATE, layout="mono")
        audio.bit_rate = 48_000
        for index, pixels in enumerate(frames_FHWC):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for frame in _audio_frames(signal):
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def write(path: Path, labels: dict[str, str], rng: np.random.Generator) -> None:
    """Writes an MP4 of the labels `colour`, `shape`, `movement` and `sound`."""
    frames = animate(labels, rng)
    encode(path, frames, sounds.synthesise(labels["sound"], SOUNDTRACK, rng))
