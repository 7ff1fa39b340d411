"""The forms of an expert: its linear layers, and its function on a block of rows with adapters.

Dispatch applies the function to blocks of any size and differentiates it block by block, so it must
treat rows independently; adapter dropout is a hash of the row's number for the same reason.
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
AdapterRules = tuple[tuple[str, LoRARule], ...]


# --------------------------------------------------------------------------------- functions


def expert_seeds(seed: jax.Array, number_E: jax.Array) -> jax.Array:
    """Seeds of the adapters' dropout in experts of these numbers, uint32 [E]: the experts of a
    token read the same row, and each is to drop entries of its own."""
    return seed ^ mix_bits(number_E.astype(jnp.uint32))


@dataclass(frozen=True)
class ExpertFunction:
    """Base: holds what is static, so that it can be a static argument of a custom gradient.

    features: width of the result; None: as wide as what the expert reads.
    hidden_cut: mesh axes that cut the hidden width where the function runs; dispatch sets it. The
        result is then this device's share of a sum.
    """

    dtype: Any
    adapters: AdapterRules = ()
    train: bool = False
    features: int | None = None
    hidden_cut: tuple[str, ...] = ()

    def axes(self) -> dict[str, tuple[str, str]]:
        """Logical axes (input, output) of every linear layer, in order."""
        raise NotImplementedError

    def first(self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array) -> Any:
        """What the layers that read x make of it, before any activation: a tuple of [R,F]."""
        raise NotImplementedError

    def hidden(self, weights: Weights, first: Any, row_R: jax.Array, seed: jax.Array) -> jax.Array:
        """What the last linear layer reads, [R,F], from what `first` gave."""
        raise NotImplementedError

    def __call__(
        self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array
    ) -> jax.Array:
        """The expert on rows."""
        return self.rest(weights, self.first(weights, x_RD, row_R, seed), row_R, seed)

    def rest(
        self,
        weights: Weights,
        first: Any,
        row_R: jax.Array,
        seed: jax.Array,
        scale_R: jax.Array | None = None,
    ) -> jax.Array:
        """The expert from what `first` gave; with `scale_R` (float32) times that.

        The factor enters before the last layer, so that its gradient needs no result of that layer:
        ⟨g, W h⟩ = ⟨Wᵀ g, h⟩ (SonicMoE, arXiv 2512.14080).
        """
        h = self.hidden(weights, first, row_R, seed)
        if scale_R is not None:
            h = (h.astype(jnp.float32) * scale_R[:, None]).astype(h.dtype)
        last = list(self.axes())[-1]
        return self.linear(last, weights, h, row_R, seed, scale_R).astype(self.dtype)

    def _first_column(self, name: str, width: int) -> jax.Array | int:
        """Where the columns that layer `name` reads on this device begin."""
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
        """Linear layer `name` of this expert on rows, its bias times `scale_R`; float32 out."""
        w = weights[name]
        rule, drop = dict(self.adapters).get(name), None
        if rule is not None and self.train and rule.dropout:
            salt = [key for key, _ in self.adapters].index(name) + 1
            seed = seed ^ jnp.uint32(salt * 0x9E3779B9 % 2**32)
            first = self._first_column(name, x_RD.shape[1])
            drop = partial(
                row_dropout, row_R=row_R, seed=seed, rate=rule.dropout, first_column=first
            )
        bias = w.get("bias")
        y = apply_linear({k: a for k, a in w.items() if k != "bias"}, x_RD, self.dtype, rule, drop)
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

    def first(self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array) -> Any:
        return tuple(
            self.linear(name, weights, x_RD, row_R, seed).astype(self.dtype)
            for name in ("gate_proj", "up_proj")
        )

    def hidden(self, weights: Weights, first: Any, row_R: jax.Array, seed: jax.Array) -> jax.Array:
        del weights, row_R, seed
        gate, up = first
        return jax.nn.silu(gate) * up


@dataclass(frozen=True)
class MlpExpert(ExpertFunction):
    """fc1, then activation and fc2, and so on to fc{depth}: layers of encoders and connectors."""

    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu
    depth: int = 2

    def axes(self) -> dict[str, tuple[str, str]]:
        both = (("expert_embed", "mlp"), ("mlp", "expert_embed"))
        return {f"fc{layer + 1}": both[layer % 2] for layer in range(self.depth)}

    def first(self, weights: Weights, x_RD: jax.Array, row_R: jax.Array, seed: jax.Array) -> Any:
        return (self.linear("fc1", weights, x_RD, row_R, seed).astype(self.dtype),)

    def hidden(self, weights: Weights, first: Any, row_R: jax.Array, seed: jax.Array) -> jax.Array:
        h = self.activation(first[0])
        for layer in range(2, self.depth):
            h = self.linear(f"fc{layer}", weights, h, row_R, seed).astype(self.dtype)
            h = self.activation(h)
        return h


# ------------------------------------------------------------------------------------- forms


class ExpertLayer(NamedTuple):
    """One linear layer of an expert: name, input and output width, their logical axes."""

    name: str
    inputs: int
    features: int
    axes: tuple[str, str]


@dataclass(frozen=True)
class SwiGLUForm:
    """Experts in place of `SwiGLU(hidden)`."""

    hidden: int
    use_bias: bool = False

    def layers(self, width: int) -> tuple[ExpertLayer, ...]:
        """The linear layers of an expert that reads `width` features."""
        return (
            ExpertLayer("gate_proj", width, self.hidden, ("expert_embed", "mlp")),
            ExpertLayer("up_proj", width, self.hidden, ("expert_embed", "mlp")),
            ExpertLayer("down_proj", self.hidden, width, ("mlp", "expert_embed")),
        )

    def function(self, options: LayerOptions, adapters: AdapterRules) -> ExpertFunction:
        """What such an expert computes."""
        return SwiGLUExpert(options.dtype, adapters, options.train)


@dataclass(frozen=True)
class MlpForm:
    """Experts in place of an MLP whose layers have `widths` units, the last being the result's."""

    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    use_bias: bool = True

    def layers(self, width: int) -> tuple[ExpertLayer, ...]:
        """The linear layers of an expert that reads `width` features."""
        sizes = (width, *self.widths)
        axes = (("expert_embed", "mlp"), ("mlp", "expert_embed"))
        return tuple(
            ExpertLayer(f"fc{i + 1}", sizes[i], sizes[i + 1], axes[i % 2])
            for i in range(len(self.widths))
        )

    def function(self, options: LayerOptions, adapters: AdapterRules) -> ExpertFunction:
        """What such an expert computes."""
        return MlpExpert(
            options.dtype,
            adapters,
            options.train,
            self.widths[-1],
            activation=self.activation,
            depth=len(self.widths),
        )


ExpertForm = SwiGLUForm | MlpForm
