"""Pixels of images against the recorded outputs of CLIPImageProcessor."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.features.recorded import find, media, recorded_names
from tests.golden_dir import thin
from unimoe_jax.data.features.clip import image_pixels, square_image
from unimoe_jax.data.media.images import load_image


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("name", recorded_names("/uint8_chw"))
def test_images_equal_clip_image_processor(golden, name, aspect):
    image, compared = load_image(media(name)), 0
    for size in (56, 336):
        expected, step = find(golden, f"{name}/{aspect}/{size}/uint8_chw")
        if expected is not None:
            pixels = square_image(image, size, aspect).transpose(2, 0, 1)
            assert pixels.shape == (3, size, size)
            np.testing.assert_array_equal(thin(pixels, step), expected)
            compared += 1
        expected, step = find(golden, f"{name}/{aspect}/{size}/pixel_values")
        if expected is not None:
            got = image_pixels(image, size, aspect)
            assert got.dtype == np.float32
            got = thin(got.transpose(2, 0, 1), step)
            np.testing.assert_allclose(got, expected, atol=1e-5, strict=True)
            compared += 1
    assert compared > 1
