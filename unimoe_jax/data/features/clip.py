"""Pixels as CLIP reads them; constants and steps of CLIPImageProcessor (its PIL path)."""

from __future__ import annotations

import numpy as np
from PIL import Image

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def square_image(image: Image.Image, size: int, aspect: str) -> np.ndarray:
    """RGB image -> uint8 [size, size, 3].

    aspect "square": resize the shorter edge to `size` (bicubic) and cut out the centre. "pad":
    first paste the image on a square of CLIP's mean colour, so that nothing is cut off.

    Example: for size 336, an image of 640 x 480 is resized to 448 x 336, and 56 columns are cut off
    on the left and on the right.
    """
    width, height = image.size
    if aspect == "pad" and width != height:
        side = max(width, height)
        red, green, blue = (int(value * 255) for value in CLIP_MEAN)
        canvas = Image.new("RGB", (side, side), (red, green, blue))
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image, (width, height) = canvas, canvas.size
    # Lengths are rounded down, as in the original.
    if width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def image_pixels(image: Image.Image, size: int, aspect: str) -> np.ndarray:
    """RGB image -> normalised float32 [size, size, 3]."""
    return (square_image(image, size, aspect) / np.float32(255) - CLIP_MEAN) / CLIP_STD
