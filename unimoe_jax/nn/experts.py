"""The function of one expert on a block of rows, with its adapters.

Dispatch applies it to blocks of any size and differentiates it block by block, so it must treat
rows independently. Dropout is a hash of (seed, row, column): the same rows are dropped whatever the
order, block or device in which they are computed, and again when the block is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from unimoe_jax.config import LoRARule
from unimoe_jax.nn.linear import matmul

Weights = dict[str, dict[str, jax.Array]]


def _mix(bits: jax.Array) -> jax.Array:
    """A full-avalanche mixing of uint32 (multiply and xor-shift, three rounds)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits


def row_dropout(
    x_RD: jax.Array, row_R: jax.Array, seed: jax.Array, salt: int, rate: float
) -> jax.Array:
    """Zero entries of x with probability `rate`, scale the others by 1 / (1 − rate).

    The mask is a function of (seed, salt, row_R[r], column) alone.
    """
    row_key = _mix(_mix(row_R.astype(jnp.uint32) + seed) + jnp.uint32(salt * 0x9E3779B9 % 2**32))
    column = jnp.arange(x_RD.shape[1], dtype=jnp.uint32) * jnp.uint32(0x85EBCA6B)
    bits = _mix(row_key[:, None] ^ _mix(column)[None, :])
    keep = bits >= jnp.uint32(rate * 2**32)
    return jnp.where(keep, x_RD / (1 - rate), 0).astype(x_RD.dtype)


@dataclass(frozen=True)
class ExpertFunction:
    """Base: holds what is static, so that it can be a static argument of a custom gradient."""

    dtype: Any
    adapters: tuple[tuple[str, LoRARule], ...] = ()
    train: bool = False

    def linear(
        self, name: str, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array
    ) -> jax.Array:
        """Linear layer `name` of this expert on rows, float32 out."""
        w = weights[name]
        y = matmul(x_RD, w["kernel"], self.dtype)
        if "bias" in w:
            y += w["bias"]
        rule = dict(self.adapters).get(name)
        if rule is not None:
            if self.train and rule.dropout:
                salt = [key for key, _ in self.adapters].index(name) + 1
                x_RD = row_dropout(x_RD, row_R, seed, salt, rule.dropout)
            down = matmul(x_RD, w["lora_a"], self.dtype)
            y += rule.alpha / rule.rank * matmul(down, w["lora_b"], self.dtype)
        return y


@dataclass(frozen=True)
class SwiGLUExpert(ExpertFunction):
    """down(silu(gate(x)) · up(x))."""

    def __call__(
        self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array
    ) -> jax.Array:
        gate = self.linear("gate_proj", weights, x_RD, row_R, seed).astype(self.dtype)
        up = self.linear("up_proj", weights, x_RD, row_R, seed).astype(self.dtype)
        h = jax.nn.silu(gate) * up
        return self.linear("down_proj", weights, h, row_R, seed).astype(self.dtype)


@dataclass(frozen=True)
class MlpExpert(ExpertFunction):
    """fc2(activation(fc1(x))), the form of encoder and connector layers."""

    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu

    def __call__(
        self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array
    ) -> jax.Array:
        h = self.linear("fc1", weights, x_RD, row_R, seed).astype(self.dtype)
        h = self.activation(h)
        return self.linear("fc2", weights, h, row_R, seed).astype(self.dtype)
