"""One image at several scales through an encoder of one input size (arXiv 2405.05949, section 3.1).

At scale s the image is enlarged s times and cut into s·s tiles of its original size; the tiles'
features are put together again and averaged back to the grid of scale 1. Nothing is seen more
sharply: the enlarged image is interpolated from the small one, as in the released models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

SHARPNESS = -0.75  # the cubic's parameter `a` in torch; jax.image and PIL take -0.5


@cache
def bicubic_matrix(size: int, factor: int) -> np.ndarray:
    """Enlarges a line of `size` samples `factor` times: float32 [size·factor, size].

    Keys' cubic convolution (IEEE TASSP 29(6), 1981, eq. 4 with a = -0.75), half-pixel centres, no
    antialiasing, border samples repeated: torch's `bicubic` with `align_corners=False`.
    """
    a = SHARPNESS
    centre = (np.arange(size * factor) + 0.5) / factor - 0.5
    first = np.floor(centre).astype(int)
    matrix = np.zeros((size * factor, size))
    for tap in range(-1, 3):
        x = np.abs(centre - first - tap)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weight = np.where(x <= 1, near, far)
        np.add.at(matrix, (np.arange(len(centre)), np.clip(first + tap, 0, size - 1)), weight)
    return matrix.astype(np.float32)


def num_views(scales: Sequence[int]) -> int:
    """Encoder inputs per image."""
    return sum(scale**2 for scale in scales)


def view_weights(scales: Sequence[int]) -> np.ndarray:
    """Weight of each view in a mean in which all scales count the same: float32 [views], sum 1."""
    return np.concatenate([np.full(s * s, 1 / (s * s * len(scales)), np.float32) for s in scales])


def views(image_BHWC: jax.Array, scales: Sequence[int]) -> jax.Array:
    """[B,H,W,C] -> [B,views,H,W,C] in the same dtype: per scale its tiles, in row-major order.

    Interpolated in float32, as in torch.
    """
    parts = []
    for scale in scales:
        if scale == 1:
            parts.append(image_BHWC[:, None])
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
        parts.append(tiles.astype(image_BHWC.dtype))
    return jnp.concatenate(parts, axis=1)


def merge(feature_BSPD: jax.Array, scales: Sequence[int], grid: int) -> jax.Array:
    """Features of the views, `grid`·`grid` patches each -> [B,P,D·scales] on the grid of scale 1.

    Tiles are put together and averaged over s·s squares in float32; scales lie side by side.
    """
    parts, start = [], 0
    for scale in scales:
        tiles = feature_BSPD[:, start : start + scale**2]
        start += scale**2
        whole = rearrange(
            tiles, "b (i j) (r c) d -> b (i r) (j c) d", i=scale, j=scale, r=grid, c=grid
        )
        mean = reduce(
            whole.astype(jnp.float32), "b (r s) (c t) d -> b (r c) d", "mean", s=scale, t=scale
        )
        parts.append(mean.astype(feature_BSPD.dtype))
    return jnp.concatenate(parts, axis=-1)
