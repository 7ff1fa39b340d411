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
    """Parameters that others may start from.

    name: for messages.
    shapes: path -> shape of every parameter.
    load: (path, index) -> that part of the array; nothing else is read.
    moe_layers: which decoder layers of the source carry experts.
    check: raises CheckpointError if the source is damaged. All processes call it before anything is
        read, and share the work.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[str, ArrayIndex], np.ndarray]
    moe_layers: tuple[bool, ...]
    check: Callable[[], None] = lambda: None

    def find(self, part: LayerPart) -> tuple[str, tuple[int, ...]]:
        """(path, leading index) of `part`.

        Raises:
            ParamError: the source has no such parameter or layer.
        """
        try:
            path, index = locate_part(part, self.moe_layers)
        except ParamError as error:
            raise ParamError(f"{self.name} {error}") from None
        if path not in self.shapes:
            where = "" if part.module is None else f" ({part})"
            raise ParamError(f"{self.name} has no {path!r}{where}")
        if index and index[0] >= self.shapes[path][0]:
            raise ParamError(
                f"{self.name} has {self.shapes[path][0]} layers in {path!r}, layer {index[0]} is "
                "wanted"
            )
        return path, index

    def piece(self, part: LayerPart) -> Piece:
        """`part` as a piece of one of this source's parameters. Raises ParamError like `find`."""
        path, index = self.find(part)
        return Piece(self, path, index)

    def modules(self) -> set[ModuleName]:
        """The modules that carry experts in this source."""
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
        """Read a part of the piece."""
        return self.source.load(self.path, (*self.index, *inner))


@dataclass(frozen=True)
class Start:
    """Where a parameter starts.

    pieces: the piece at every index of the leading axes, which are those of layers, of experts, of
        both, or none.
    """

    shape: tuple[int, ...]
    pieces: Mapping[tuple[int, ...], Piece]

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """Read the part of the parameter at `index`, one slice per axis.

        A piece that several entries start from, such as an upcycled dense layer, is read once.
        """
        ranges = [range(*cut.indices(n)) for cut, n in zip(index, self.shape, strict=True)]
        num_leading = len(next(iter(self.pieces)))
        result = np.empty([len(entries) for entries in ranges], dtype)
        # Piece -> the leading indices of `result` that it fills.
        targets: dict[Piece, list[tuple[int, ...]]] = {}
        for positions in itertools.product(*map(enumerate, ranges[:num_leading])):
            piece = self.pieces[tuple(entry for _, entry in positions)]
            targets.setdefault(piece, []).append(tuple(position for position, _ in positions))

        def fill(piece: Piece) -> None:
            value = piece.read(index[num_leading:])
            for target in targets[piece]:
                result[target] = value

        with ThreadPoolExecutor(READERS) as pool:
            # An error in a thread is raised here only because the results are consumed.
            list(pool.map(fill, targets))
        return result
