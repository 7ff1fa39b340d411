"""Untrusted image files: refused with a named reason, or read with defined pixels."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from PIL import Image

from tests.data.media.helpers import assert_refused
from unimoe_jax.data.media.images import ImageLimits, load_image
from unimoe_jax.data.tally import BadSample


def test_refused_images(folder):
    root = folder.root
    folder.image("whole.jpg", (200, 200))
    data = (root / "whole.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(data[: len(data) // 2])
    (root / "page.jpg").write_text("<html>not found</html>")
    (root / "empty.png").write_bytes(b"")
    (root / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("cut.jpg", "page.jpg", "empty.png", "script.png"):
        assert_refused(load_image, root / name, "unreadable_image")
    assert_refused(load_image, root / "none.png", "missing_file")
    folder.image("thin.png", (1, 1000))
    assert_refused(load_image, root / "thin.png", "aspect_ratio")
    with pytest.raises(BadSample, match="exceeds 100 pixels"):
        load_image(str(root / "whole.jpg"), ImageLimits(max_pixels=100))


def test_huge_images_are_refused_before_decoding(folder):
    Image.new("1", (20000, 10000)).save(folder.root / "huge.png")
    Image.new("1", (10000, 10000)).save(folder.root / "large.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(load_image, folder.root / "huge.png", "image_too_large")
    assert_refused(load_image, folder.root / "large.png", "image_too_large")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_unusual_images_have_defined_pixels(folder):
    root = folder.root
    deep = Image.fromarray(np.full((4, 4), 0x8080, np.uint16))
    deep.save(root / "deep.png")
    assert load_image(str(root / "deep.png")).getpixel((0, 0)) == (128, 128, 128)
    folder.image("alpha.png", mode="RGBA", value=200)
    assert load_image(str(root / "alpha.png")).getpixel((0, 0)) == (200, 30, 60)
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(root / "cmyk.jpg")
    assert load_image(str(root / "cmyk.jpg")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4))
    palette.putpalette([9, 60, 200])
    palette.save(root / "palette.png", transparency=bytes([7]))  # Pillow would warn
    assert load_image(str(root / "palette.png")).getpixel((0, 0)) == (9, 60, 200)
    first, second = (Image.new("P", (4, 4), colour) for colour in (0, 1))
    first.save(root / "moving.gif", save_all=True, append_images=[second])
    assert load_image(str(root / "moving.gif")).size == (4, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (40, 20)).save(root / "rotated.jpg", exif=exif)
    assert load_image(str(root / "rotated.jpg")).size == (20, 40)
    assert load_image(folder.root / folder.image("dot.png", (1, 1))).size == (1, 1)
