"""The forms of an expert: its linear layers, and its function on a block of rows with adapters.

Dispatch applies the function to blocks of any size and differentiates it block by block. The
function must therefore treat every row independently of the others. For the same reason adapter
dropout is a hash of the row's number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unimoe_jax.config import LoRARule
from unimoe_jax.nn.linear import LayerOptions, apply_linear, mix_bits, row_dropout

Weights = dict[str, dict[str, jax.Array]]
"""The arrays of an expert, or of all experts: {layer: {leaf: array}}."""
AdapterRules = tuple[tuple[str, LoRARule], ...]
"""Pairs (layer, rule) for the layers that have an adapter."""


# --------------------------------------------------------------------------------- functions


def expert_seeds(seed: jax.Array, number_E: jax.Array) -> jax.Array:
    """Return a seed of adapter dropout for every expert, uint32 [E], from the experts' numbers.

    The experts of a token read the same row, which has one row number. Without separate seeds they
    would all drop the same entries of it.
    """
    return seed ^ mix_bits(number_E.astype(jnp.uint32))


@dataclass(frozen=True)
class ExpertFunction:
    """Base of the functions that experts compute; its fields are static.

    A custom gradient takes the function as a static argument, so it holds no arrays.

    Attributes:
        dtype: the dtype of activations and of the factors of products.
        adapters: the adapter rules by linear layer.
        train: whether adapter dropout is drawn.
        features: the width of the result; None means as wide as the input of the expert.
        hidden_cut: the mesh axes that cut the hidden width where the function runs, set by
            dispatch. If there are any, a device computes only its share of a sum.
    """

    dtype: Any
    adapters: AdapterRules = ()
    train: bool = False
    features: int | None = None
    hidden_cut: tuple[str, ...] = ()

    def axes(self) -> dict[str, tuple[str, str]]:
        """Return the logical axes (input, output) of every linear layer, in order."""
        raise NotImplementedError

    def first_layers(
        self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array
    ) -> Any:
        """Apply the layers that read x, before any activation: a tuple of arrays [R,F]."""
        raise NotImplementedError

    def hidden(
        self, weights: Weights, pre_activations: Any, row_R: jax.Array, seed: jax.Array
    ) -> jax.Array:
        """Return the input of the last layer, [R,F], from the results of `first_layers`."""
        raise NotImplementedError

    def __call__(
        self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array
    ) -> jax.Array:
        """Apply the expert to rows, [R,features].

        Args:
            weights: the arrays of this expert.
            x_RD: rows of tokens.
            row_R: uint32, the number of each row in the whole batch.
            seed: uint32, this expert's seed of adapter dropout.
        """
        pre_activations = self.first_layers(weights, x_RD, row_R, seed)
        return self.later_layers(weights, pre_activations, row_R, seed)

    def later_layers(
        self,
        weights: Weights,
        pre_activations: Any,
        row_R: jax.Array,
        seed: jax.Array,
        scale_R: jax.Array | None = None,
    ) -> jax.Array:
        """Return the result of the expert from the results of `first_layers`.

        Args:
            scale_R: float32, factors of the rows of the result, or None. They are applied before
                the last layer, so that their gradient does not need the result of that layer:
                ⟨g, W h⟩ = ⟨Wᵀ g, h⟩ (SonicMoE, arXiv 2512.14080).
        """
        h = self.hidden(weights, pre_activations, row_R, seed)
        if scale_R is not None:
            h = (h.astype(jnp.float32) * scale_R[:, None]).astype(h.dtype)
        last = list(self.axes())[-1]
        return self.linear(last, weights, h, row_R, seed, scale_R).astype(self.dtype)

    def _first_column(self, name: str, width: int) -> jax.Array | int:
        """Return the column of the whole input at which this device's input of `name` begins."""
        if self.hidden_cut and self.axes()[name][0] == "mlp":
            return jax.lax.axis_index(self.hidden_cut) * width
        return 0

    def linear(
        self,
        name: str,
        weights: Weights,
        x_RD: jax.Array,
        row_R: jax.Array,
        seed: jax.Array,
        scale_R: jax.Array | None = None,
    ) -> jax.Array:
        """Apply linear layer `name` of this expert to rows, with float32 results.

        Args:
            scale_R: factors of the bias, or None. The rows of x already contain them.
        """
        leaves = weights[name]
        rule, drop = dict(self.adapters).get(name), None
        if rule is not None and self.train and rule.dropout:
            # Give every adapter of the expert a separate seed, by its place among the adapters.
            salt = [layer for layer, _ in self.adapters].index(name) + 1
            seed = seed ^ jnp.uint32(salt * 0x9E3779B9 % 2**32)
            first_column = self._first_column(name, x_RD.shape[1])
            drop = partial(
                row_dropout, row_R=row_R, seed=seed, rate=rule.dropout, first_column=first_column
            )
        # Add the bias here, because `apply_linear` knows no factors of rows.
        bias = leaves.get("bias")
        without_bias = {leaf: array for leaf, array in leaves.items() if leaf != "bias"}
        y = apply_linear(without_bias, x_RD, self.dtype, rule, drop)
        if bias is not None:
            bias = jnp.broadcast_to(bias, y.shape)
            y += bias if scale_R is None else bias * scale_R[:, None]
        return y


@dataclass(frozen=True)
class SwiGLUExpert(ExpertFunction):
    """down(silu(gate(x)) · up(x))."""

    def axes(self) -> dict[str, tuple[str, str]]:
        return {
            "gate_proj": ("expert_embed", "mlp"),
            "up_proj": ("expert_embed", "mlp"),
            "down_proj": ("mlp", "expert_embed"),
        }

    def first_layers(
        self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array
    ) -> Any:
        return tuple(
            self.linear(name, weights, x_RD, row_R, seed).astype(self.dtype)
            for name in ("gate_proj", "up_proj")
        )

    def hidden(
        self, weights: Weights, pre_activations: Any, row_R: jax.Array, seed: jax.Array
    ) -> jax.Array:
        del weights, row_R, seed
        gate, up = pre_activations
        return jax.nn.silu(gate) * up


@dataclass(frozen=True)
class MlpExpert(ExpertFunction):
    """fc1, then an activation and fc2, and so on to fc{depth}, as in encoders and connectors.

    Attributes:
        activation: the activation between two layers.
        depth: the number of linear layers.
    """

    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu
    depth: int = 2

    def axes(self) -> dict[str, tuple[str, str]]:
        # The layers read and write the hidden width in turn.
        pairs = (("expert_embed", "mlp"), ("mlp", "expert_embed"))
        return {f"fc{layer + 1}": pairs[layer % 2] for layer in range(self.depth)}

    def first_layers(
        self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array
    ) -> Any:
        return (self.linear("fc1", weights, x_RD, row_R, seed).astype(self.dtype),)

    def hidden(
        self, weights: Weights, pre_activations: Any, row_R: jax.Array, seed: jax.Array
    ) -> jax.Array:
        h = self.activation(pre_activations[0])
        for layer in range(2, self.depth):
            h = self.linear(f"fc{layer}", weights, h, row_R, seed).astype(self.dtype)
            h = self.activation(h)
        return h


# ------------------------------------------------------------------------------------- forms


class ExpertLayer(NamedTuple):
    """One linear layer of an expert: its name, its widths, and its axes (input, output)."""

    name: str
    inputs: int
    features: int
    axes: tuple[str, str]


@dataclass(frozen=True)
class SwiGLUForm:
    """The form of experts in place of `nn.mlp.SwiGLU(hidden)`."""

    hidden: int
    use_bias: bool = False

    def layers(self, width: int) -> tuple[ExpertLayer, ...]:
        """Return the linear layers of an expert that reads `width` features."""
        return (
            ExpertLayer("gate_proj", width, self.hidden, ("expert_embed", "mlp")),
            ExpertLayer("up_proj", width, self.hidden, ("expert_embed", "mlp")),
            ExpertLayer("down_proj", self.hidden, width, ("mlp", "expert_embed")),
        )

    def function(self, options: LayerOptions, adapters: AdapterRules) -> ExpertFunction:
        """Return the function of an expert of this form."""
        return SwiGLUExpert(options.dtype, adapters, options.train)


@dataclass(frozen=True)
class MlpForm:
    """The form of experts in place of an MLP with the output widths `widths` of its layers.

    The last width is that of the result. Example: `widths` (4096, 1024) is a layer to 4096 units,
    an activation and a layer to 1024 units.
    """

    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    use_bias: bool = True

    def layers(self, width: int) -> tuple[ExpertLayer, ...]:
        """Return the linear layers of an expert that reads `width` features."""
        sizes = (width, *self.widths)
        pairs = (("expert_embed", "mlp"), ("mlp", "expert_embed"))
        return tuple(
            ExpertLayer(f"fc{i + 1}", sizes[i], sizes[i + 1], pairs[i % 2])
            for i in range(len(self.widths))
        )

    def function(self, options: LayerOptions, adapters: AdapterRules) -> ExpertFunction:
        """Return the function of an expert of this form."""
        return MlpExpert(
            options.dtype,
            adapters,
            options.train,
            features=self.widths[-1],
            activation=self.activation,
            depth=len(self.widths),
        )


ExpertForm = SwiGLUForm | MlpForm
