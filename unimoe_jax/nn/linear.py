"""Linear layers, plain and per expert, each with its optional low-rank adapter.

The parameters `kernel`, `bias`, `lora_a` and `lora_b` of a layer are siblings in `params`. Adapters
are therefore frozen, merged and saved by rules about parameter paths; no module has to be replaced.
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
# Variance 1 / fan-in. The values are drawn from a uniform distribution because a normal one makes
# the program that draws a whole model, and its compile time, about a third larger.
fan_in: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
fan_in_per_expert: Initializer = nn.initializers.variance_scaling(
    1.0, "fan_in", "uniform", batch_axis=0
)
# Kaiming-uniform with a = sqrt(5), which is U(-1, 1) / sqrt(fan_in). PyTorch uses it by default,
# and implementations of LoRA use it for the matrix A.
torch_uniform: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
lora_init = torch_uniform
lora_init_per_expert: Initializer = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", batch_axis=0
)


@dataclass(frozen=True)
class LayerOptions:
    """The settings of a run that every layer receives.

    Attributes:
        dtype: the dtype of computations and activations. Parameters are cast to it where they are
            used.
        lora: adapter rules, matched against module paths. The first rule that matches applies.
        train: whether adapter dropout is drawn, which needs the rng named `dropout`.
        keep_hidden: whether experts keep the results of their first linear layers for the backward
            pass. This makes sense only in layers that are not recomputed as a whole.
        attention: "auto" or "xla", see `ModelConfig`. In a whole model the value of `ModelConfig`
            is used.
    """

    dtype: Any = jnp.float32
    lora: tuple[LoRARule, ...] = ()
    train: bool = False
    keep_hidden: bool = False
    attention: AttentionProgram = "auto"

    def adapter(self, path: Sequence[str]) -> LoRARule | None:
        """Return the adapter rule for the module at `path`, or None if no rule matches."""
        joined = "/".join(path)
        return next((rule for rule in self.lora if re.fullmatch(rule.match, joined)), None)


def declare(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: Sequence[int],
    axes: Sequence[str | None],
) -> jax.Array:
    """Declare one float32 parameter of `module`: shape, initialiser and logical axes together.

    Raises:
        ValueError: `axes` does not name every dimension of `shape`.
    """
    if len(axes) != len(shape):
        path = "/".join((*module.path, name))
        raise ValueError(
            f"{path}: shape {tuple(shape)} has {len(shape)} dimensions, but {len(axes)} logical "
            f"axes are named: {tuple(axes)}; name one axis per dimension"
        )
    boxed = nn.with_logical_partitioning(init, tuple(axes))
    # `param` returns the array itself. Only the variables that `init` returns are in boxes, which
    # carry the logical axes.
    parameter: Any = module.param(name, boxed, tuple(shape), jnp.float32)
    return parameter


def mix_bits(bits: jax.Array) -> jax.Array:
    """Hash uint32 values so that every input bit affects every output bit.

    Three rounds of xor-shift and multiplication; the factor of the last round is 1.
    """
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
    """Set entries of x to zero with probability `rate`, and scale the others by 1 / (1 − rate).

    The mask is a hash of (seed, row_R[r], column) and of nothing else. The same rows therefore drop
    the same entries in whatever order, block or device they are computed, and again when the
    backward pass recomputes a block. A hash is also much less code to compile than a generator of
    random numbers.

    Args:
        x_RD: activations [R,D].
        row_R: integers, the number of each row in the whole batch.
        seed: uint32 scalar.
        rate: the probability that an entry is dropped, from 0 to below 1.
        first_column: the column of the whole array at which x begins. It is not 0 where a device
            holds only some of the columns.
    """
    row_key = mix_bits(mix_bits(row_R.astype(jnp.uint32)) ^ seed)
    column = jnp.arange(x_RD.shape[1], dtype=jnp.uint32) + jnp.asarray(first_column, jnp.uint32)
    column = mix_bits(column * jnp.uint32(0x85EBCA6B))
    bits = mix_bits(row_key[:, None] ^ column[None, :])
    keep = bits >= jnp.uint32(rate * 2**32)
    return jnp.where(keep, x_RD / (1 - rate), 0).astype(x_RD.dtype)


def dropout(x: jax.Array, seed: jax.Array, rate: float) -> jax.Array:
    """Apply `row_dropout` to x [..., D], with rows numbered through all leading axes."""
    rows = jnp.arange(x.size // x.shape[-1], dtype=jnp.uint32)
    return row_dropout(x.reshape(-1, x.shape[-1]), rows, seed, rate).reshape(x.shape)


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """Return x[..., I] @ kernel[I, O] in float32, with factors in `dtype` and float32 sums.

    The result is float32 because XLA's CPU backend multiplies bfloat16 twice as fast with a float32
    result as without.
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
    """Return x W (+ b) (+ alpha/rank · drop(x) A B with the adapter `rule`), float32 [..., O].

    Args:
        weights: kernel [I,O], and where present bias [O], lora_a [I,R], lora_b [R,O].
        x: activations [..., I].
        dtype: the dtype of the factors of all products.
        rule: the adapter rule of the layer, or None if the layer has no adapter.
        drop: dropout of the adapter's input, or None if nothing is dropped.
    """
    leading = x.shape[:-1]
    # Flatten the leading axes first: the weight gradient sums over all of them, and XLA would
    # transpose (copy) its operands to sum over several axes.
    x = x.reshape(-1, x.shape[-1])
    y = matmul(x, weights["kernel"], dtype)
    if "bias" in weights:
        y += jnp.broadcast_to(weights["bias"], y.shape)
    if rule is not None:
        # Apply alpha / rank to the R columns between A and B, because these are the fewest numbers
        # to scale, in the forward pass and in the backward pass.
        down = rule.alpha / rule.rank * matmul(drop(x) if drop else x, weights["lora_a"], dtype)
        y += matmul(down, weights["lora_b"], dtype)
    return y.reshape(*leading, -1)


def adapter_seed(
    module: nn.Module, options: LayerOptions, rule: LoRARule | None
) -> jax.Array | None:
    """Draw the uint32 seed of the adapter's dropout, or return None if nothing is dropped."""
    if rule is None or not options.train or not rule.dropout:
        return None
    return jax.random.bits(module.make_rng("dropout"), dtype=jnp.uint32)


class LinearParameters(nn.Module):
    """Base of the modules that declare the parameters of one linear layer.

    Attributes:
        features: O, the width of the output.
        axes: logical axes of the kernel, (input, output).
        kernel_init: the initialiser of the kernel.
    """

    features: int
    options: LayerOptions
    use_bias: bool = False
    axes: tuple[str | None, str | None] = ("embed", "mlp")
    kernel_init: Initializer = fan_in

    def weights(self, inputs: int, rule: LoRARule | None) -> dict[str, jax.Array]:
        """Declare the parameters that `apply_linear` takes, for an input of width `inputs`."""
        features, (first, last) = self.features, self.axes
        kernel = declare(self, "kernel", self.kernel_init, (inputs, features), self.axes)
        weights = {"kernel": kernel}
        zeros = nn.initializers.zeros
        if self.use_bias:
            weights["bias"] = declare(self, "bias", zeros, (features,), (last,))
        if rule is not None:
            shape_a, shape_b = (inputs, rule.rank), (rule.rank, features)
            weights["lora_a"] = declare(self, "lora_a", lora_init, shape_a, (first, "rank"))
            # B starts at zero, so that a new adapter does not change the layer.
            weights["lora_b"] = declare(self, "lora_b", zeros, shape_b, ("rank", last))
        return weights


class Linear(LinearParameters):
    """y = x W (+ b) (+ alpha/rank · dropout(x) A B when an adapter rule matches this path).

    LoRA: arXiv 2106.09685, section 4.1. A is drawn Kaiming-uniform, and B is zero.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rule = self.options.adapter(self.path)
        weights = self.weights(x.shape[-1], rule)
        seed = adapter_seed(self, self.options, rule)
        drop = None
        if rule is not None and seed is not None:
            drop = partial(dropout, seed=seed, rate=rule.dropout)
        dtype = self.options.dtype
        return apply_linear(weights, x, dtype, rule, drop).astype(dtype)


class ExpertLinear(nn.Module):
    """Declares the weights of one linear layer in each of E experts; dispatch applies them.

    Calling it returns a dict of `kernel` [E,I,O], and where present `bias` [E,O], `lora_a` [E,I,R]
    and `lora_b` [E,R,O], all float32.
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
        zeros = nn.initializers.zeros
        # The initialisers treat the expert axis as a batch axis, so that the scale of a kernel does
        # not depend on the number of experts.
        shape, axes = (experts, self.inputs, self.features), ("expert", first, last)
        weights = {"kernel": declare(self, "kernel", fan_in_per_expert, shape, axes)}
        if self.use_bias:
            shape, axes = (experts, self.features), ("expert", last)
            weights["bias"] = declare(self, "bias", zeros, shape, axes)
        rule = self.options.adapter(self.path)
        if rule is not None:
            shape, axes = (experts, self.inputs, rule.rank), ("expert", first, "rank")
            weights["lora_a"] = declare(self, "lora_a", lora_init_per_expert, shape, axes)
            # As in `Linear`, B starts at zero.
            shape, axes = (experts, rule.rank, self.features), ("expert", "rank", last)
            weights["lora_b"] = declare(self, "lora_b", zeros, shape, axes)
        return weights
