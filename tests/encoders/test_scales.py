"""The views of an image at several scales, and how their features are merged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.encoders import scales

RNG = np.random.default_rng(0)


def test_bicubic_weights_of_factor_three():
    """The weights that a = -0.75 gives at the three output positions of a sample."""
    matrix = scales.bicubic_matrix(7, 3)
    before = np.array([-1 / 18, 10 / 27, 43 / 54, -1 / 9])
    np.testing.assert_allclose(matrix[9, 1:5], before, atol=1e-7)
    np.testing.assert_array_equal(matrix[10], np.eye(7)[3])  # the middle position is a sample
    np.testing.assert_allclose(matrix[11, 2:6], before[::-1], atol=1e-7)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)


def test_border_samples_are_repeated():
    line = np.concatenate([[5.0] * 4, RNG.standard_normal(3)])
    inside = scales.bicubic_matrix(7, 2) @ line
    np.testing.assert_allclose((scales.bicubic_matrix(4, 2) @ line[3:])[0], inside[6], rtol=1e-6)


@pytest.mark.parametrize("factor", [2, 3])
def test_enlarging_agrees_with_torch(factor: int):
    torch = pytest.importorskip("torch")
    image = RNG.standard_normal((2, 6, 6, 3)).astype(np.float32)
    tiles = scales.views(jnp.asarray(image), (1, factor))
    np.testing.assert_array_equal(tiles[:, 0], image)
    large = torch.nn.functional.interpolate(
        torch.from_numpy(image.transpose(0, 3, 1, 2)), scale_factor=factor, mode="bicubic"
    ).numpy()
    for number in range(factor**2):
        row, column = divmod(number, factor)
        expected = large[:, :, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
        np.testing.assert_allclose(
            tiles[:, 1 + number], expected.transpose(0, 2, 3, 1), atol=2e-6, err_msg=str(number)
        )


def test_merge_averages_squares_of_the_whole_image():
    """The features of a patch are its row and column, so the mean of a square is its centre."""
    grid, factor = 2, 3
    side = grid * factor
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1)
    tiles = place.reshape(factor, grid, factor, grid, 2).swapaxes(1, 2)
    tiles = tiles.reshape(1, factor**2, grid**2, 2).astype(np.float32)
    base = RNG.standard_normal((1, 1, grid**2, 2)).astype(np.float32)
    merged = scales.merge(jnp.concatenate([base, tiles], axis=1), (1, factor), grid)
    assert merged.shape == (1, grid**2, 4)
    np.testing.assert_array_equal(merged[..., :2], base[:, 0])
    np.testing.assert_allclose(merged[0, :, 2:], [[1, 1], [1, 4], [4, 1], [4, 4]])


def test_every_scale_has_the_same_weight():
    weights = scales.view_weights((1, 3))
    assert scales.num_views((1, 3)) == len(weights) == 10
    np.testing.assert_allclose([weights[0], weights[1:].sum()], [0.5, 0.5], rtol=1e-6)


def test_low_precision_images_are_enlarged_in_float32():
    image = jnp.asarray(RNG.standard_normal((1, 4, 4, 3)), jnp.bfloat16)
    low = scales.views(image, (1, 3))
    assert low.dtype == jnp.bfloat16
    exact = scales.views(image.astype(jnp.float32), (1, 3))
    np.testing.assert_array_equal(low, exact.astype(jnp.bfloat16))


def test_gradient_of_views_is_their_transpose():
    image = jnp.asarray(RNG.standard_normal((1, 4, 4, 1)), jnp.float32)
    cotangent = jnp.asarray(RNG.standard_normal((1, 10, 4, 4, 1)), jnp.float32)
    value, pull = jax.vjp(lambda x: scales.views(x, (1, 3)), image)
    (gradient,) = pull(cotangent)
    np.testing.assert_allclose(jnp.vdot(value, cotangent), jnp.vdot(image, gradient), rtol=1e-4)
