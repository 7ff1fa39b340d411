"""Pixels as CLIP reads them."""

from __future__ import annotations

import numpy as np
from PIL import Image

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def square_image(image: Image.Image, size: int, aspect: str) -> np.ndarray:
    """RGB image -> uint8 [size, size, 3].

    aspect "square": shortest edge to `size` (bicubic), centre crop. "pad": first paste on a square
    of CLIP's mean colour.
    """
    width, height = image.size
    if aspect == "pad" and width != height:
        side = max(width, height)
        colour = tuple(int(value * 255) for value in CLIP_MEAN)
        canvas = Image.new("RGB", (side, side), colour)
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image, (width, height) = canvas, canvas.size
    if width <= height:
        new = (size, int(size * height / width))
    else:
        new = (int(size * width / height), size)
    image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def image_pixels(image: Image.Image, size: int, aspect: str) -> np.ndarray:
    """RGB image -> normalised float32 [size, size, 3]."""
    return (square_image(image, size, aspect) / np.float32(255) - CLIP_MEAN) / CLIP_STD
