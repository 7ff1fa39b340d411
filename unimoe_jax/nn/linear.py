"""Linear layers, plain and per expert, that own their low-rank adapters.

`kernel`, `bias`, `lora_a`, `lora_b` are siblings in `params`, so that freezing, merging and saving
adapters are decisions about paths, not about modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimoe_jax.config import AttentionProgram, LoRARule

Initializer = Callable[..., jax.Array]
# Uniform, not normal: a third of the program that draws a whole model, hence of its compile time.
fan_in: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
fan_in_per_expert: Initializer = nn.initializers.variance_scaling(
    1.0, "fan_in", "uniform", batch_axis=0
)
# Kaiming-uniform with a = sqrt(5), torch's default and the convention of LoRA implementations:
# U(-1, 1)/sqrt(fan_in).
torch_uniform: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
lora_init = torch_uniform
lora_init_per_expert: Initializer = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", batch_axis=0
)


@dataclass(frozen=True)
class LayerOptions:
    """What every layer needs to know about the run.

    Attributes:
        dtype: computations and activations; parameters are cast to it where they are used.
        lora: adapter rules, matched against module paths; the first match wins.
        train: draw adapter dropout (needs the `dropout` rng).
        keep_hidden: experts keep what their first layers computed for the backward pass; for
            layers that are not recomputed as a whole.
        attention: "auto" or "xla", see `ModelConfig`, whose word counts in a whole model.
    """

    dtype: Any = jnp.float32
    lora: tuple[LoRARule, ...] = ()
    train: bool = False
    keep_hidden: bool = False
    attention: AttentionProgram = "auto"

    def adapter(self, path: Sequence[str]) -> LoRARule | None:
        """The adapter rule for the module at `path`, if any."""
        joined = "/".join(path)
        return next((rule for rule in self.lora if re.fullmatch(rule.match, joined)), None)


def declare(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: Sequence[int],
    axes: Sequence[str | None],
) -> jax.Array:
    """One declaration per weight: float32 shape, initialiser and logical axes together."""
    if len(axes) != len(shape):
        raise ValueError(f"{module.path}/{name}: shape {tuple(shape)} but axes {tuple(axes)}")
    boxed = nn.with_logical_partitioning(init, tuple(axes))
    return module.param(name, boxed, tuple(shape), jnp.float32)


def mix_bits(bits: jax.Array) -> jax.Array:
    """A full-avalanche mixing of uint32 (multiply and xor-shift, three rounds)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits


def row_dropout(
    x_RD: jax.Array,
    row_R: jax.Array,
    seed: jax.Array,
    rate: float,
    first_column: jax.Array | int = 0,
) -> jax.Array:
    """Zero entries of x with probability `rate`, scale the others by 1 / (1 − rate).

    The mask is a hash of (seed, row_R[r], column) alone: the same rows drop the same entries
    whatever the order, block or device in which they are computed, and again when a block is
    recomputed in the backward pass. It is also much less code to compile than a generator.
    `first_column` is the column at which x begins, where a device holds some of the columns.
    """
    row_key = mix_bits(mix_bits(row_R.astype(jnp.uint32)) ^ seed)
    column = jnp.arange(x_RD.shape[1], dtype=jnp.uint32) + jnp.asarray(first_column, jnp.uint32)
    column = mix_bits(column * jnp.uint32(0x85EBCA6B))
    bits = mix_bits(row_key[:, None] ^ column[None, :])
    keep = bits >= jnp.uint32(rate * 2**32)
    return jnp.where(keep, x_RD / (1 - rate), 0).astype(x_RD.dtype)


def dropout(x: jax.Array, seed: jax.Array, rate: float) -> jax.Array:
    """`row_dropout` with rows numbered through all leading axes."""
    rows = jnp.arange(x.size // x.shape[-1], dtype=jnp.uint32)
    return row_dropout(x.reshape(-1, x.shape[-1]), rows, seed, rate).reshape(x.shape)


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """x[..., I] @ kernel[I, O] in `dtype`, accumulated in float32, returned in float32.

    XLA's CPU backend is twice as fast for bf16 with a float32 result than without.
    """
    return jax.lax.dot_general(
        x.astype(dtype),
        kernel.astype(dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def apply_linear(
    weights: Mapping[str, jax.Array],
    x: jax.Array,
    dtype: Any,
    rule: LoRARule | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """x[..., I] W (+ b) (+ alpha/rank · drop(x) A B with the adapter `rule`): float32 [..., O].

    weights: kernel [I,O], and where present bias [O], lora_a [I,R], lora_b [R,O].
    """
    lead = x.shape[:-1]
    # One axis of rows: of sums over several, as gradients of weights are, the compiler makes
    # transposed copies.
    x = x.reshape(-1, x.shape[-1])
    y = matmul(x, weights["kernel"], dtype)
    if "bias" in weights:
        y += jnp.broadcast_to(weights["bias"], y.shape)
    if rule is not None:
        # Scaled here, where there are few columns, forward and backward.
        down = rule.alpha / rule.rank * matmul(drop(x) if drop else x, weights["lora_a"], dtype)
        y += matmul(down, weights["lora_b"], dtype)
    return y.reshape(*lead, -1)


def adapter_seed(module: nn.Module, options: LayerOptions, rule: LoRARule | None):
    """uint32 seed of the adapter's dropout, or None where nothing is dropped."""
    if rule is None or not options.train or not rule.dropout:
        return None
    return jax.random.bits(module.make_rng("dropout"), dtype=jnp.uint32)


class Linear(nn.Module):
    """y = x W (+ b) (+ alpha/rank · dropout(x) A B when an adapter rule matches this path).

    LoRA: arXiv 2106.09685, section 4.1. A is Kaiming-uniform, B zero.
    """

    features: int
    options: LayerOptions
    use_bias: bool = False
    axes: tuple[str | None, str | None] = ("embed", "mlp")
    init: Initializer = fan_in

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rule = self.options.adapter(self.path)
        weights = self.weights(x.shape[-1], rule)
        seed = adapter_seed(self, self.options, rule)
        drop = None if seed is None else partial(dropout, seed=seed, rate=rule.dropout)
        dtype = self.options.dtype
        return apply_linear(weights, x, dtype, rule, drop).astype(dtype)

    def weights(self, inputs: int, rule: LoRARule | None) -> dict[str, jax.Array]:
        """Declare what `apply_linear` takes."""
        features, (first, last) = self.features, self.axes
        weights = {"kernel": declare(self, "kernel", self.init, (inputs, features), self.axes)}
        zeros = nn.initializers.zeros
        if self.use_bias:
            weights["bias"] = declare(self, "bias", zeros, (features,), (last,))
        if rule is not None:
            shapes = (inputs, rule.rank), (rule.rank, features)
            weights["lora_a"] = declare(self, "lora_a", lora_init, shapes[0], (first, "rank"))
            weights["lora_b"] = declare(self, "lora_b", zeros, shapes[1], ("rank", last))
        return weights


class ExpertLinear(nn.Module):
    """Declares the weights of one linear layer in each of E experts; dispatch applies them.

    Returns a dict of `kernel [E,I,O]`, and where present `bias [E,O]`, `lora_a [E,I,R]`,
    `lora_b [E,R,O]`, float32.
    """

    num_experts: int
    inputs: int
    features: int
    options: LayerOptions
    use_bias: bool = False
    axes: tuple[str | None, str | None] = ("expert_embed", "mlp")

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        experts, (first, last) = self.num_experts, self.axes
        kernel_shape = (experts, self.inputs, self.features)
        weights = {
            "kernel": declare(
                self, "kernel", fan_in_per_expert, kernel_shape, ("expert", first, last)
            )
        }
        if self.use_bias:
            zeros = nn.initializers.zeros
            weights["bias"] = declare(
                self, "bias", zeros, (experts, self.features), ("expert", last)
            )
        rule = self.options.adapter(self.path)
        if rule is not None:
            weights["lora_a"] = declare(
                self,
                "lora_a",
                lora_init_per_expert,
                (experts, self.inputs, rule.rank),
                ("expert", first, "rank"),
            )
            weights["lora_b"] = declare(
                self,
                "lora_b",
                nn.initializers.zeros,
                (experts, rule.rank, self.features),
                ("expert", "rank", last),
            )
        return weights
