"""Where a stage's parameters start: earlier stages, checkpoints, experts from dense layers, fresh.

Sources may stack their layers elsewhere than the target (a dense decoder hands over to one with
experts in every second layer), so layers are matched by module and number, not by stacked path.
`members` and `place` translate between the two. Nothing is read to find out where a parameter
starts; then any part of it can be read without the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unimoe_jax.checkpoints.sources import ParamSource, Piece, Start
from unimoe_jax.config import Take
from unimoe_jax.params.layer_parts import LayerPart, layer_parts
from unimoe_jax.params.paths import ParamError, first_match

CHECKPOINT = "checkpoint:"
"""Prefix of a source that is a checkpoint's path, not an earlier stage."""


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
    sources: Mapping[str, ParamSource],
    moe_layers: tuple[bool, ...],
) -> Start:
    """Where target parameter `path` starts according to `take`, which is not `fresh`.

    Raises:
        ParamError: the source lacks it or holds another shape; both are named.
    """
    shape, pieces = tuple(shape), {}
    try:
        for at, member in layer_parts(path, shape, moe_layers):
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
    member: LayerPart, shape: tuple[int, ...], take: Take, sources: Mapping[str, ParamSource]
) -> dict[tuple[int, ...], Piece]:
    if take.source:
        return {(): sources[take.source].piece(member)}
    if member.expert is None:
        raise ParamError(f"{take.match!r} makes experts, but matches what is none")
    # `upcycle` copies one dense layer to every expert; `experts` lists one source per expert.
    names = take.experts or take.origins * shape[0]
    return {(e,): sources[name].piece(member.dense) for e, name in enumerate(names)}


def needed_sources(takes: Sequence[Take]) -> list[str]:
    """Names of all sources but `fresh`, without repetition, in order of mention."""
    names = [name for take in takes for name in take.origins]
    return [name for name in dict.fromkeys(names) if name != "fresh"]
