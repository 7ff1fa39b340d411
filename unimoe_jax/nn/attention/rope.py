"""Rotary position embedding, half-split layout (arXiv 2104.09864 as LLaMA pairs dimensions)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_tables(
    position_BT: jax.Array, head_dim: int, theta: float, table_dtype: str = "float32"
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32 [B,T,H/2]: angle = position · theta^(−2i/H).

    `table_dtype` (joined by "_" where there are two) rounds the tables, as the originals do when
    they are loaded in half precision.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = position_BT.astype(jnp.float32)[..., None] / (theta**exponent)[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    for dtype in table_dtype.split("_"):
        cos, sin = cos.astype(dtype), sin.astype(dtype)
    return cos.astype(jnp.float32), sin.astype(jnp.float32)


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate (x[i], x[i + H/2]) by the position's angle; float32 inside, dtype of x outside."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
