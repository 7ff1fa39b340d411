"""Where a stage's parameters start: earlier stages, checkpoints, experts from dense layers, fresh.

Sources may stack their layers elsewhere than the target (a dense decoder hands over to one with
experts in every second layer), so layers are matched by module and number, not by stacked path.
`members` and `place` translate between the two. Nothing is read to find out where a parameter
starts; then any part of it can be read without the rest.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from unimoe_jax.config import ModuleName, Take
from unimoe_jax.nn.stack import where_is
from unimoe_jax.params import ParamError, first_match

EXPERTS = "moe/experts/"
ROUTER = "moe/router/"
READERS = 8
"""Threads that read the layers and experts of one parameter side by side."""
Index = tuple[int | slice, ...]
_DECODER = re.compile(r"decoder/run_(\d+)/block_(\d+)/(.+)")
_ENCODER = re.compile(r"vision/encoder/(layers|unread_layers)/(.+)")
_CONNECTOR = re.compile(r"vision/connector/(.+)")


class Member(NamedTuple):
    """One layer's part of a parameter, whatever stack it lies in.

    module: what may carry experts, or None; layer: None where the module has no stack; rest: the
    path within the layer, or the whole path outside the modules; stack: the encoder has two.
    """

    module: ModuleName | None
    layer: int | None
    rest: str
    stack: str = ""

    @property
    def expert(self) -> str | None:
        """The linear layer's path within an expert, or None."""
        return self.rest.removeprefix(EXPERTS) if self.rest.startswith(EXPERTS) else None

    @property
    def is_router(self) -> bool:
        return self.module is not None and self.rest.startswith(ROUTER)

    @property
    def dense(self) -> Member:
        """The parameter of the dense layer that experts' `self` stacks: the decoder's and the
        encoder's layers keep it under `mlp`, a connector is the layer itself."""
        prefix = "" if self.module == "connector" else "mlp/"
        return self._replace(rest=prefix + (self.expert or ""))

    @property
    def experts(self) -> Member | None:
        """The other way: the experts' parameter that could stand in place of a dense one."""
        prefix = "" if self.module == "connector" else "mlp/"
        if self.module is None or self.rest.startswith("moe/") or not self.rest.startswith(prefix):
            return None
        return self._replace(rest=EXPERTS + self.rest.removeprefix(prefix))

    def __str__(self) -> str:
        if self.module is None:
            return self.rest
        layer = "" if self.layer is None else f" {self.stack or 'layer'} {self.layer},"
        return f"{self.module}{layer} {self.rest}"


def members(
    path: str, shape: Sequence[int], moe_layers: Sequence[bool]
) -> list[tuple[tuple[int, ...], Member]]:
    """[(leading index, what lies there)] of the parameter `path`.

    Args:
        moe_layers: which decoder layers carry experts.
    """
    if found := _DECODER.fullmatch(path):
        run, block = int(found[1]), int(found[2])
        layers = [
            number
            for number, at in enumerate(where_is(moe_layers))
            if (at.run, at.block) == (run, block)
        ]
        return [((i,), Member("decoder", n, found[3])) for i, n in enumerate(layers)]
    if found := _ENCODER.fullmatch(path):
        numbers = range(shape[0])
        return [((layer,), Member("encoder", layer, found[2], found[1])) for layer in numbers]
    if found := _CONNECTOR.fullmatch(path):
        return [((), Member("connector", None, found[1]))]
    return [((), Member(None, None, path))]


def place(member: Member, moe_layers: Sequence[bool]) -> tuple[str, tuple[int, ...]]:
    """(path, leading index) of a member; the inverse of `members`.

    Raises:
        ParamError: the decoder has no such layer.
    """
    if member.module == "decoder":
        if member.layer >= len(moe_layers):
            raise ParamError(
                f"has {len(moe_layers)} decoder layers, layer {member.layer} is wanted"
            )
        at = where_is(moe_layers)[member.layer]
        return f"decoder/{at.prefix}/{member.rest}", (at.index,)
    if member.module == "encoder":
        return f"vision/encoder/{member.stack}/{member.rest}", (member.layer,)
    if member.module == "connector":
        return f"vision/connector/{member.rest}", ()
    return member.rest, ()


@dataclass(frozen=True, eq=False)
class Source:
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
    load: Callable[[str, Index], np.ndarray]
    moe_layers: tuple[bool, ...]
    check: Callable[[], None] = lambda: None

    def find(self, member: Member) -> tuple[str, tuple[int, ...]]:
        """(path, leading index) of `member`.

        Raises:
            ParamError: the source lacks it.
        """
        try:
            path, index = place(member, self.moe_layers)
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

    def piece(self, member: Member) -> Piece:
        """`member` as a part of a parameter here. Raises ParamError as `find` does."""
        return Piece(self, *self.find(member))

    def modules(self) -> set[ModuleName]:
        """The modules that carry experts there."""
        found: set[ModuleName] = set()
        for path, shape in self.shapes.items():
            if EXPERTS in path:
                found |= {member.module for _, member in members(path, shape, self.moe_layers)}
        return found - {None}


class Piece(NamedTuple):
    """What parameter `path` of `source` holds at leading index `index`."""

    source: Source
    path: str
    index: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shapes[self.path][len(self.index) :])

    def read(self, inner: Index) -> np.ndarray:
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


def origin_of(path: str, takes: Sequence[Take]) -> Take:
    """The first take that matches.

    Raises:
        ParamError: none matches.
    """
    index = first_match(takes, path, lambda take: take.match)
    if index is None:
        raise ParamError(
            f"init: nothing says where {path!r} starts; end the list with "
            '{match: ".*", source: fresh}'
        )
    return takes[index]


def start_of(
    path: str,
    shape: Sequence[int],
    take: Take,
    sources: Mapping[str, Source],
    moe_layers: tuple[bool, ...],
) -> Start:
    """Where target parameter `path` starts according to `take`, which is not `fresh`.

    Raises:
        ParamError: the source lacks it or holds another shape; both are named.
    """
    shape, pieces = tuple(shape), {}
    try:
        for at, member in members(path, shape, moe_layers):
            for inner, piece in _pieces(member, shape[len(at) :], take, sources).items():
                pieces[(*at, *inner)] = piece
    except ParamError as error:
        raise ParamError(f"init: {path!r}: {error}") from None
    lead = [1 + max(axis) for axis in zip(*pieces, strict=True)]
    for piece in pieces.values():
        if (*lead, *piece.shape) != shape:
            found = f"{' '.join(take.origins)} has {(*lead, *piece.shape)}"
            raise ParamError(f"init: {path!r} needs shape {shape}, {found}")
    return Start(shape, pieces)


def _pieces(
    member: Member, shape: tuple[int, ...], take: Take, sources: Mapping[str, Source]
) -> dict[tuple[int, ...], Piece]:
    if take.source:
        return {(): sources[take.source].piece(member)}
    if member.expert is None:
        raise ParamError(f"{take.match!r} makes experts, but matches what is none")
    # Copies of one layer are as many as the model has experts; named ones are as many as there are.
    names = take.experts or (take.upcycle,) * shape[0]
    return {(e,): sources[name].piece(member.dense) for e, name in enumerate(names)}


def needed_sources(takes: Sequence[Take]) -> list[str]:
    """Names of all sources but `fresh`, without repetition, in order of mention."""
    names = [name for take in takes for name in take.origins]
    return [name for name in dict.fromkeys(names) if name != "fresh"]
