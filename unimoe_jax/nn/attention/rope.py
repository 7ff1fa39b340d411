"""Rotary position embedding, half-split layout (arXiv 2104.09864 as LLaMA pairs dimensions)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_tables(
    position_BT: jax.Array, head_dim: int, theta: float, table_dtype: str = "float32"
) -> tuple[jax.Array, jax.Array]:
    """Return (cos, sin) of the angles position · theta^(−2i/H), each float32 [B,T,H/2].

    Example: at position 1, with H = 4 and theta = 100, the angles are 1 and 100^(−2/4) = 0.1.

    Args:
        position_BT: integers, the position of each token in its sample.
        head_dim: H, the width of a head, which is even.
        theta: the base of the angles.
        table_dtype: the dtype to which the tables are rounded, or several joined by "_", applied in
            turn. The original models round their tables when they are loaded in half precision.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = position_BT.astype(jnp.float32)[..., None] / (theta**exponent)[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    for dtype in table_dtype.split("_"):
        cos, sin = cos.astype(dtype), sin.astype(dtype)
    return cos.astype(jnp.float32), sin.astype(jnp.float32)


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (x[i], x[i + H/2]) of every head by the angles of its position.

    Args:
        x_BTNH: queries or keys. The rotation is computed in float32 and returned in their dtype.
        cos, sin: the tables of `rope_tables`, float32 [B,T,H/2].
    """
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # the same angles for all heads
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
