"""One image at several scales through an encoder of one input size (arXiv 2405.05949, section 3.1).

At scale s the image is enlarged s times and cut into s·s tiles of its original size. After the
encoder, the features of the tiles are put together again and averaged to the grid of scale 1. The
tiles hold no more detail than the image, because the enlarged image is interpolated from the small
one, as in the released models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

SHARPNESS = -0.75
"""The parameter `a` of the cubic in torch; jax.image and PIL use -0.5."""


@cache
def bicubic_matrix(size: int, factor: int) -> np.ndarray:
    """The matrix [size·factor, size] float32 that enlarges a line of `size` samples `factor` times.

    This is Keys' cubic convolution (IEEE TASSP 29(6), 1981, eq. 4 with a = -0.75) with half-pixel
    centres, no antialiasing and repeated border samples, which is torch's `bicubic` with
    `align_corners=False`.
    """
    a = SHARPNESS
    # The position of every output sample on the line of inputs, and the input to the left of it.
    centre = (np.arange(size * factor) + 0.5) / factor - 0.5
    first = np.floor(centre).astype(int)
    matrix = np.zeros((size * factor, size))
    # Four inputs contribute to every output; x is their distance from the output's position.
    for tap in range(-1, 3):
        x = np.abs(centre - first - tap)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weight = np.where(x <= 1, near, far)
        # Inputs beyond the border are the border sample, so their weights add up in its column.
        np.add.at(matrix, (np.arange(len(centre)), np.clip(first + tap, 0, size - 1)), weight)
    return matrix.astype(np.float32)


def num_views(scales: Sequence[int]) -> int:
    """The number of encoder inputs per image, for example 1 + 9 for the scales 1 and 3."""
    return sum(scale**2 for scale in scales)


def view_weights(scales: Sequence[int]) -> np.ndarray:
    """Weight of each view in a mean over all scales: float32 [views] with sum 1.

    Every scale has the same total weight, which its tiles share: 1/2 and nine times 1/18 for the
    scales 1 and 3.
    """
    return np.concatenate([np.full(s * s, 1 / (s * s * len(scales)), np.float32) for s in scales])


def views(image_BHWC: jax.Array, scales: Sequence[int]) -> jax.Array:
    """Cut images [B,H,W,C] into the tiles of all scales: [B,views,H,W,C] in the same dtype.

    The tiles of a scale follow each other in row-major order. Images are interpolated in float32,
    as in torch.
    """
    views_of_scales = []
    for scale in scales:
        if scale == 1:
            views_of_scales.append(image_BHWC[:, None])
            continue
        height, width = image_BHWC.shape[1:3]
        large = jnp.einsum(
            "bhwc,yh,xw->byxc",
            image_BHWC.astype(jnp.float32),
            bicubic_matrix(height, scale),
            bicubic_matrix(width, scale),
            precision=jax.lax.Precision.HIGHEST,
        )
        tiles = rearrange(large, "b (i h) (j w) c -> b (i j) h w c", i=scale, j=scale)
        views_of_scales.append(tiles.astype(image_BHWC.dtype))
    return jnp.concatenate(views_of_scales, axis=1)


def merge(feature_BSPD: jax.Array, scales: Sequence[int], grid: int) -> jax.Array:
    """Merge the features of all views [B,views,P,D] on the grid of scale 1: [B,P,D·scales].

    The tiles of scale s form a grid that is s times as large in both directions, and every square
    of s·s patches is averaged in float32. The features of the scales are concatenated.

    Example with the scales 1 and 2 and a grid of 2 x 2: the four tiles of scale 2 form a grid of
    4 x 4 patches. Its upper left square, which is the whole first tile, becomes patch 0.

    Args:
        grid: patches per side of a view, so P = grid · grid.
    """
    merged, start = [], 0
    for scale in scales:
        tiles = feature_BSPD[:, start : start + scale**2]
        start += scale**2
        whole = rearrange(
            tiles, "b (i j) (r c) d -> b (i r) (j c) d", i=scale, j=scale, r=grid, c=grid
        )
        mean = reduce(
            whole.astype(jnp.float32), "b (r s) (c t) d -> b (r c) d", "mean", s=scale, t=scale
        )
        merged.append(mean.astype(feature_BSPD.dtype))
    return jnp.concatenate(merged, axis=-1)
