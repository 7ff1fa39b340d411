"""Parameter sources: checkpoints and earlier stages of which any part can be read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from unimoe_jax.config import ModuleName
from unimoe_jax.params.layer_parts import EXPERTS, LayerPart, layer_parts, locate_part
from unimoe_jax.params.paths import ParamError

READERS = 8
"""Threads that read the layers and experts of one parameter at the same time."""
ArrayIndex = tuple[int | slice, ...]


@dataclass(frozen=True, eq=False)
class ParamSource:
    """Parameters to take from.

    Attributes:
        name: for messages.
        shapes: path -> shape of everything there is.
        load: (path, index) -> that part of the array; nothing else need be read.
        moe_layers: which decoder layers carry experts there.
        check: raises where the source is damaged. All processes call it, before anything is read:
            they share the work.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[str, ArrayIndex], np.ndarray]
    moe_layers: tuple[bool, ...]
    check: Callable[[], None] = lambda: None

    def find(self, member: LayerPart) -> tuple[str, tuple[int, ...]]:
        """(path, leading index) of `member`.

        Raises:
            ParamError: the source lacks it.
        """
        try:
            path, index = locate_part(member, self.moe_layers)
        except ParamError as error:
            raise ParamError(f"{self.name} {error}") from None
        if path not in self.shapes:
            where = "" if member.module is None else f" ({member})"
            raise ParamError(f"{self.name} has no {path!r}{where}")
        if index and index[0] >= self.shapes[path][0]:
            raise ParamError(
                f"{self.name} has {self.shapes[path][0]} layers in {path!r}, layer {index[0]} is "
                "wanted"
            )
        return path, index

    def piece(self, member: LayerPart) -> Piece:
        """`member` as a part of a parameter here. Raises ParamError as `find` does."""
        return Piece(self, *self.find(member))

    def modules(self) -> set[ModuleName]:
        """The modules that carry experts there."""
        parts = [
            part
            for path, shape in self.shapes.items()
            if EXPERTS in path
            for _, part in layer_parts(path, shape, self.moe_layers)
        ]
        return {part.module for part in parts if part.module is not None}


@dataclass(frozen=True)
class Piece:
    """The part of the parameter `path` of `source` at the leading index `index`."""

    source: ParamSource
    path: str
    index: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shapes[self.path][len(self.index) :])

    def read(self, inner: ArrayIndex) -> np.ndarray:
        """A part of it."""
        return self.source.load(self.path, (*self.index, *inner))


@dataclass(frozen=True)
class Start:
    """Where a parameter starts: `pieces` holds what lies at every index of its leading axes (of
    layers, experts, both or none)."""

    shape: tuple[int, ...]
    pieces: Mapping[tuple[int, ...], Piece]

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The part of the parameter at `index`, one slice per axis.

        Every place in a source is read once, however many entries start there.
        """
        ranges = [range(*at.indices(n)) for at, n in zip(index, self.shape, strict=True)]
        lead = len(next(iter(self.pieces)))
        part = np.empty([len(of) for of in ranges], dtype)
        entries: dict[Piece, list[tuple[int, ...]]] = {}
        for places in itertools.product(*map(enumerate, ranges[:lead])):
            piece = self.pieces[tuple(entry for _, entry in places)]
            entries.setdefault(piece, []).append(tuple(at for at, _ in places))

        def fill(piece: Piece) -> None:
            value = piece.read(index[lead:])
            for at in entries[piece]:
                part[at] = value

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, entries))  # the list raises what a thread has raised
        return part
