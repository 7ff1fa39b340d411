"""Conversion tables as data, and their expansion into single copies.

A table lists entries. An `Entry` holds the name pattern of a source tensor, the path of a parameter
and how axes move between them. Patterns may hold `{l}` (layer) and `{e}` (expert). In a parameter
path, `{l}` stands for the prefix of the stack that holds the layer; layers and experts are leading
indices of the stacked parameter. The inverse of an entry exports the parameter again.

Example, for a stack of two layers under the prefix `layers`:

    Entry("base:model.{l}.w.weight", "decoder/{l}/w/kernel", "o i -> i o")

expands to a copy of `base:model.0.w.weight` into `decoder/layers/w/kernel[0]` and a copy of
`base:model.1.w.weight` into `decoder/layers/w/kernel[1]`, both transposed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        src: `group:name` of the source tensor; a group is one file or folder of the family.
        dst: path of the parameter.
        rearrange: einops pattern from the source tensor to (a slice of) the parameter; empty if
            both have the same layout.
        sizes: sizes of the axes that the parameter's shape does not determine.
    """

    src: str
    dst: str
    rearrange: str = ""
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Excuse:
    """Source tensors that no entry uses, and the reason why nothing is lost without them.

    Attributes:
        match: regular expression for the whole of `group:name`.
        reason: written to the manifest and printed by an import.
    """

    match: str
    reason: str


@dataclass(frozen=True)
class Adapter:
    """`scale` · B A is added to a source matrix; `a` names A [R, in], `b` names B [out, R]."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Copy:
    """One source tensor that goes into one slice of one parameter.

    Attributes:
        src, dst, rearrange, sizes: as in `Entry`, without `{l}` and `{e}`.
        index: leading index of the slice: layer in its stack, expert, both or empty.
        adapter: added to the source matrix before it is rearranged.
    """

    src: str
    dst: str
    index: tuple[int, ...]
    rearrange: str
    sizes: tuple[tuple[str, int], ...]
    adapter: Adapter | None = field(default=None)

    def source_shape(self, target: Sequence[int]) -> tuple[int, ...]:
        """Shape that the source tensor must have; `target` is the whole parameter's shape."""
        shape = tuple(target[len(self.index) :])
        if not self.rearrange:
            return shape
        left, right = self.rearrange.split("->")
        sizes = _axis_sizes(right, shape, dict(self.sizes))
        return tuple(math.prod(sizes[axis] for axis in group) for group in _groups(left))

    def forward(self, value: np.ndarray) -> np.ndarray:
        """Source tensor -> slice of the parameter."""
        # Without a pattern or with a transposition the result is a view: nothing is copied here.
        if not self.rearrange:
            return value
        return rearrange(value, self.rearrange, **dict(self.sizes))

    def backward(self, value: np.ndarray) -> np.ndarray:
        """Slice of the parameter -> source tensor, contiguous."""
        # Files of exports are written from contiguous bytes.
        if not self.rearrange:
            return np.ascontiguousarray(value)
        left, right = (side.strip() for side in self.rearrange.split("->"))
        sizes = _axis_sizes(right, value.shape, dict(self.sizes))
        # einops takes sizes by keyword, and the axis "1" has no name.
        named_sizes = {axis: size for axis, size in sizes.items() if axis.isidentifier()}
        return np.ascontiguousarray(rearrange(value, f"{right} -> {left}", **named_sizes))


def _groups(side: str) -> list[list[str]]:
    """`a (b c)` -> [[a], [b, c]]."""
    # A term is a parenthesis with several axes, or a single axis.
    terms = re.findall(r"\([^)]*\)|\S+", side)
    return [term.strip("()").split() for term in terms]


def _axis_sizes(side: str, shape: Sequence[int], known: dict[str, int]) -> dict[str, int]:
    """Size of every axis on one side of a pattern, from the shape of that side.

    Example: `(p q) d` with shape [12, 5] and p = 3 known gives p = 3, q = 4, d = 5.
    """
    sizes = known | {"1": 1}
    groups = _groups(side)
    # einops checks this, too, but only when values are read.
    if len(groups) != len(shape):
        raise ConvertError(f"pattern {side!r} does not fit shape {tuple(shape)}")
    for group, size in zip(groups, shape, strict=True):
        unknown = [axis for axis in group if axis not in sizes]
        if len(unknown) > 1:
            raise ConvertError(f"pattern {side!r}: sizes of {unknown} are unknown")
        if unknown:
            # Axes of parameters are products of the known sizes, so there is no remainder.
            sizes[unknown[0]] = size // math.prod(sizes[axis] for axis in group if axis in sizes)
    return sizes


def expand(
    entries: Iterable[Entry],
    layers: Mapping[int, Place | tuple[str, int]] | None = None,
    experts: Sequence[int] | None = None,
) -> list[Copy]:
    """The copies of a table: one per entry, layer and expert.

    Args:
        layers: layer number -> its place in a stack, as `Place` or (prefix, index); entries with
            `{l}` need it.
        experts: expert numbers; entries with `{e}` need them.
    """
    copies = []
    for entry in entries:
        for layer, prefix, layer_index in _layer_slots(entry, layers):
            # A layer has its number in the source's name and its stack in the parameter's path.
            dst = entry.dst.replace("{l}", prefix)
            for expert, expert_index in _expert_slots(entry, experts):
                src = entry.src.format(l=layer, e=expert)
                # A parameter is stacked by layers first, then by experts.
                index = layer_index + expert_index
                copies.append(Copy(src, dst, index, entry.rearrange, entry.sizes))
    return copies


def _layer_slots(
    entry: Entry, layers: Mapping[int, Place | tuple[str, int]] | None
) -> Iterator[tuple[int | None, str, tuple[int, ...]]]:
    """(layer number, prefix of its stack, its leading index) for each layer of an entry."""
    if "{l}" not in entry.dst:
        yield None, "", ()
        return
    if layers is None:
        raise TypeError(f"entry {entry.dst!r} needs layers")
    for layer, place in layers.items():
        prefix, index = (place.prefix, place.index) if isinstance(place, Place) else place
        yield layer, prefix, (index,)


def _expert_slots(
    entry: Entry, experts: Sequence[int] | None
) -> Iterator[tuple[int | None, tuple[int, ...]]]:
    """(expert number, its leading index) for each expert of an entry."""
    if "{e}" not in entry.src:
        yield None, ()
        return
    if experts is None:
        raise TypeError(f"entry {entry.src!r} needs experts")
    for expert in experts:
        yield expert, (expert,)


def linear(src: str, dst: str, bias: bool = True) -> tuple[Entry, ...]:
    """Entries of a torch Linear."""
    weight = Entry(f"{src}.weight", f"{dst}/kernel", LINEAR)
    return (weight, Entry(f"{src}.bias", f"{dst}/bias")) if bias else (weight,)


def norm(src: str, dst: str, bias: bool = True) -> tuple[Entry, ...]:
    """Entries of a torch LayerNorm, or of an RMSNorm if `bias` is false."""
    weight = Entry(f"{src}.weight", f"{dst}/scale")
    return (weight, Entry(f"{src}.bias", f"{dst}/bias")) if bias else (weight,)


def flat_stack(count: int, prefix: str = "layers") -> dict[int, tuple[str, int]]:
    """Places of `count` layers that are all stacked under one prefix."""
    return {layer: (prefix, layer) for layer in range(count)}


@dataclass(frozen=True)
class Rounding:
    """How a loader rounds the weights that it reads.

    Attributes:
        before: dtype of the weights when adapters are merged into them.
        after: dtypes that the merged weights are then rounded to, one after the other.
        rope_table: `DecoderConfig.rope_table_dtype` of the same loader.
    """

    before: str
    after: tuple[str, ...]
    rope_table: str
