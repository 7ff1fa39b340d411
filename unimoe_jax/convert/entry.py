"""Conversion tables as data, and their expansion into single copies.

A table lists `Entry`s: name pattern of the source tensor, path of the parameter, and how axes move.
Patterns may hold `{l}` (layer) and `{e}` (expert). In a parameter path `{l}` stands for where that
layer's stack lies; layers and experts are leading indices of the stacked parameter. The inverse of
an entry exports the parameter again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from einops import rearrange

from unimoe_jax.convert.reader import ConvertError
from unimoe_jax.nn.stack import Place

LINEAR = "o i -> i o"  # torch keeps [out, in], this package [in, out]


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    Attributes:
        src: `group:name` of the source tensor; the group is a file or folder of the family.
        dst: parameter path.
        rearrange: einops pattern from source to (a slice of) the parameter; empty: as it is.
        sizes: axes that the pattern cannot know.
    """

    src: str
    dst: str
    rearrange: str = ""
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Excuse:
    """Source tensors (`re.fullmatch` on `group:name`) that no entry uses, and why that is right."""

    match: str
    reason: str


@dataclass(frozen=True)
class Adapter:
    """scale · B A to be added to a source matrix: names of A [R, in] and B [out, R]."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Copy:
    """One source tensor into one slice of one parameter."""

    src: str
    dst: str
    index: tuple[int, ...]
    rearrange: str
    sizes: tuple[tuple[str, int], ...]
    adapter: Adapter | None = field(default=None)

    def source_shape(self, target: Sequence[int]) -> tuple[int, ...]:
        """Shape the source tensor must have, from the shape of the whole parameter."""
        shape = tuple(target[len(self.index) :])
        if not self.rearrange:
            return shape
        left, right = self.rearrange.split("->")
        sizes = _solve(right, shape, dict(self.sizes))
        return tuple(math.prod(sizes[axis] for axis in group) for group in _groups(left))

    def forward(self, value: np.ndarray) -> np.ndarray:
        """Source tensor -> slice of the parameter."""
        if not self.rearrange:
            return value
        return rearrange(value, self.rearrange, **dict(self.sizes))

    def backward(self, value: np.ndarray) -> np.ndarray:
        """Slice of the parameter -> source tensor, contiguous."""
        if not self.rearrange:
            return np.ascontiguousarray(value)
        left, right = (side.strip() for side in self.rearrange.split("->"))
        sizes = _solve(right, value.shape, dict(self.sizes))
        known = {axis: size for axis, size in sizes.items() if axis.isidentifier()}
        return np.ascontiguousarray(rearrange(value, f"{right} -> {left}", **known))


def _groups(side: str) -> list[list[str]]:
    """`a (b c)` -> [[a], [b, c]]."""
    parts = re.findall(r"\([^)]*\)|\S+", side)
    return [part.strip("()").split() for part in parts]


def _solve(side: str, shape: Sequence[int], known: dict[str, int]) -> dict[str, int]:
    """Size of every axis of one side of a pattern, given the shape of that side."""
    sizes = known | {"1": 1}
    groups = _groups(side)
    if len(groups) != len(shape):
        raise ConvertError(f"pattern {side!r} does not fit shape {tuple(shape)}")
    for group, size in zip(groups, shape, strict=True):
        unknown = [axis for axis in group if axis not in sizes]
        if len(unknown) > 1:
            raise ConvertError(f"pattern {side!r}: sizes of {unknown} are unknown")
        if unknown:
            sizes[unknown[0]] = size // math.prod(sizes[axis] for axis in group if axis in sizes)
    return sizes


def expand(
    entries: Iterable[Entry],
    layers: Mapping[int, Place | tuple[str, int]] | None = None,
    experts: Sequence[int] | None = None,
) -> list[Copy]:
    """Concrete copies of a table.

    Args:
        layers: layer number -> its place in a stack; needed by entries with `{l}`.
        experts: expert numbers; needed by entries with `{e}`.
    """
    copies = []
    for entry in entries:
        numbers = layers.items() if "{l}" in entry.dst else [(None, ("", 0))]
        for layer, place in numbers:
            prefix, index = (place.prefix, place.index) if isinstance(place, Place) else place
            dst = entry.dst.replace("{l}", prefix)
            lead = () if layer is None else (index,)
            for expert in experts if "{e}" in entry.src else [None]:
                last = () if expert is None else (expert,)
                src = entry.src.format(l=layer, e=expert)
                copies.append(Copy(src, dst, lead + last, entry.rearrange, entry.sizes))
    return copies


def linear(src: str, dst: str, bias: bool = True) -> tuple[Entry, ...]:
    """Entries of a torch Linear."""
    weight = Entry(f"{src}.weight", f"{dst}/kernel", LINEAR)
    return (weight, Entry(f"{src}.bias", f"{dst}/bias")) if bias else (weight,)


def norm(src: str, dst: str, bias: bool = True) -> tuple[Entry, ...]:
    """Entries of a torch LayerNorm (or RMSNorm: no bias)."""
    weight = Entry(f"{src}.weight", f"{dst}/scale")
    return (weight, Entry(f"{src}.bias", f"{dst}/bias")) if bias else (weight,)


def flat_stack(count: int, prefix: str = "layers") -> dict[int, tuple[str, int]]:
    """Places of `count` layers stacked under one prefix."""
    return {layer: (prefix, layer) for layer in range(count)}


@dataclass(frozen=True)
class Rounding:
    """How a loader rounds: dtype before adapters are merged, then one dtype after the other.

    rope_table: `DecoderConfig.rope_table_dtype` of the same loader.
    """

    before: str
    after: tuple[str, ...]
    rope_table: str
