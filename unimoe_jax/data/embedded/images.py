"""Pictures of one coloured shape on a dark, noisy background."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = 48  # pixels per side
SUPERSAMPLE = 4  # sub-pixels per side, so that edges are smooth

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 240),
    "yellow": (235, 215, 40),
    "purple": (165, 50, 195),
    "white": (235, 235, 235),
}
SHAPES = ("ring", "square", "triangle", "cross")


class Placing(NamedTuple):
    """The place of a shape: centre and radius in pixels, rotation in radians."""

    x: float
    y: float
    radius: float
    angle: float


def place(rng: np.random.Generator, low: float = 13.0, high: float = 18.0) -> Placing:
    """Draw a placing near the middle, so that the whole shape is inside the picture."""
    radius = rng.uniform(low, high)
    x, y = SIZE / 2 + rng.uniform(-4, 4, 2)
    return Placing(x, y, radius, rng.uniform(-0.15, 0.15))


def coverage(shape: str, placing: Placing) -> np.ndarray:
    """Share of each pixel that is inside the shape: float [48, 48] in 0..1."""
    # Coordinates of the centres of all sub-pixels, in units of the shape's radius.
    step = 1 / SUPERSAMPLE
    axis = np.arange(SIZE * SUPERSAMPLE) * step + step / 2
    x = (axis[None, :] - placing.x) / placing.radius
    y = (axis[:, None] - placing.y) / placing.radius
    # Rotate them back by the angle of the shape.
    cos, sin = np.cos(placing.angle), np.sin(placing.angle)
    inside = _inside(shape, cos * x + sin * y, cos * y - sin * x)
    return inside.reshape(SIZE, SUPERSAMPLE, SIZE, SUPERSAMPLE).mean((1, 3))


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points are inside the shape of radius 1: bool, as u and v; v points down, as in
    pictures."""
    match shape:
        case "ring":
            return (u**2 + v**2 < 1.0) & (u**2 + v**2 > 0.3)
        case "square":
            return np.maximum(abs(u), abs(v)) < 0.85
        case "triangle":
            return (v < 0.75) & (abs(u) < (v + 0.95) * 0.6)
        case "cross":
            return (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 1)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def ground(rng: np.random.Generator) -> np.ndarray:
    """Draw a dark background with a slight tint: float [3], values 0..255."""
    return rng.uniform(10, 45) + rng.uniform(-8, 8, 3)


def paint(
    coverage_HW: np.ndarray,
    colour_C: np.ndarray,
    ground_C: np.ndarray,
    rng: np.random.Generator,
    noise: float = 9.0,
) -> np.ndarray:
    """Blend shape and background and add noise: uint8 [48, 48, 3]."""
    alpha = coverage_HW[..., None]
    picture = alpha * colour_C + (1 - alpha) * ground_C
    picture += rng.normal(0, noise, picture.shape)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def tint(colour: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a shade of the named colour, a little brighter or darker: float [3], values 0..255."""
    return np.array(COLOURS[colour]) * rng.uniform(0.82, 1.05)


def write(path: Path, labels: dict[str, str], rng: np.random.Generator) -> None:
    """Write a PNG of the labels `colour` and `shape`."""
    mask = coverage(labels["shape"], place(rng))
    pixels = paint(mask, tint(labels["colour"], rng), ground(rng), rng)
    Image.fromarray(pixels).save(path, format="PNG")
