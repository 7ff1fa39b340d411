"""The function of one expert on a block of rows, with its adapters.

Dispatch applies it to blocks of any size and differentiates it block by block, so it must treat
rows independently; adapter dropout is a hash of the row's number for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from unimoe_jax.config import LoRARule
from unimoe_jax.nn.linear import matmul, row_dropout

Weights = dict[str, dict[str, jax.Array]]


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
            y += jnp.broadcast_to(w["bias"], y.shape)
        rule = dict(self.adapters).get(name)
        if rule is not None:
            if self.train and rule.dropout:
                salt = [key for key, _ in self.adapters].index(name) + 1
                seed = seed ^ jnp.uint32(salt * 0x9E3779B9 % 2**32)
                x_RD = row_dropout(x_RD, row_R, seed, rule.dropout)
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
