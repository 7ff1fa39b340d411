"""Image files -> RGB pixels."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unimoe_jax.data.tally import BadSample

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageLimits:
    """Limits above which an image is refused before it is decoded: its pixels, and its longer side
    divided by its shorter side."""

    max_pixels: int = 89_478_485
    max_aspect_ratio: float = 200


DEFAULT_LIMITS = ImageLimits()


def load_image(path: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Return the first frame of an image file, upright, as 8-bit RGB.

    Alpha is dropped, as in the originals; 16-bit grey is scaled (Pillow alone would clip it).
    Raises `BadSample`: missing_file, unreadable_image, image_too_large, aspect_ratio.
    """
    with open_image(path, IMAGE_FORMATS) as image:
        # Opening reads the header only, so the size is known before any pixel is decoded.
        check_image_size(path, image.size, limits)
        return to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def open_image(path: str, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Open an image file of one of `formats`.

    Every error of Pillow, here or when the block decodes pixels, becomes a `BadSample`.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images; `check_image_size` refuses them by the run's limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as image:
                yield image
    except FileNotFoundError as error:
        raise BadSample("missing_file", f"no such file: {path}") from error
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise BadSample("unreadable_image", f"{path}: not one of {formats}") from error
    # Pillow lets the last two pass if a later frame of a GIF breaks off.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
        raise BadSample("unreadable_image", f"{path}: {error}") from error


def check_image_size(path: str, size: tuple[int, int], limits: ImageLimits) -> None:
    """Raise `BadSample` (image_too_large, aspect_ratio) if (width, height) exceeds the limits."""
    width, height = size
    if width * height > limits.max_pixels:
        raise BadSample(
            "image_too_large", f"{path}: {width}x{height} exceeds {limits.max_pixels} pixels"
        )
    if max(size) > limits.max_aspect_ratio * min(size):
        raise BadSample(
            "aspect_ratio", f"{path}: {width}x{height} exceeds 1:{limits.max_aspect_ratio:g}"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB.

    Raises ValueError for floating-point pixels, which have no defined range.
    """
    if image.mode.startswith("I"):
        # 16-bit grey; 65535 / 257 = 255.
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(values.clip(0, 65535) / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    elif image.mode == "P":
        # Converted directly to RGB, Pillow would warn about each palette with alpha.
        image = image.convert("RGBA")
    return image.convert("RGB")
