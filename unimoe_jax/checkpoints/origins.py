"""Where a stage's parameters start: in earlier stages, checkpoints, dense layers, or at random.

A source may stack its layers in another way than the target: a dense decoder has one stack, and a
decoder with experts in every second layer has two. So layers are matched by module and number, and
not by the path of the stack (`params.layer_parts` translates between the two). Nothing is read to
find out where a parameter starts; afterwards any part of it can be read without the rest.
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
    """The first rule that matches the parameter `path`.

    Raises:
        ParamError: no rule matches.
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
    """Where the parameter `path` of the target starts according to `take`, which is not `fresh`.

    For example, `mlp/up_proj/kernel` of experts has the shape [layers, experts, D, F] = [2, 4, 8,
    32].
    With `upcycle: pft`, all four entries of a layer are one piece, the dense kernel [8, 32] of that
    layer in `pft`; the pieces have the leading indices (0, 0) … (1, 3).

    Raises:
        ParamError: the source lacks the parameter or has another shape; both are named.
    """
    shape = tuple(shape)
    pieces: dict[tuple[int, ...], Piece] = {}
    try:
        for layer, part in layer_parts(path, shape, moe_layers):
            for expert, piece in _pieces(part, shape[len(layer) :], take, sources).items():
                pieces[(*layer, *expert)] = piece
    except ParamError as error:
        raise ParamError(f"init: {path!r}: {error}") from None
    # The leading axes that the pieces fill, and behind them the axes of one piece, must give
    # `shape`.
    leading = [1 + max(axis) for axis in zip(*pieces, strict=True)]
    for piece in pieces.values():
        source_shape = (*leading, *piece.shape)
        if source_shape != shape:
            raise ParamError(
                f"init: {path!r} needs shape {shape}, {' '.join(take.origins)} has {source_shape}"
            )
    return Start(shape, pieces)


def _pieces(
    part: LayerPart, shape: tuple[int, ...], take: Take, sources: Mapping[str, ParamSource]
) -> dict[tuple[int, ...], Piece]:
    """The pieces of one layer, by expert where the rule makes experts. shape: without the layer
    axis.
    """
    if take.source:
        return {(): sources[take.source].piece(part)}
    if part.expert is None:
        raise ParamError(f"{take.match!r} makes experts, but this is no parameter of experts")
    # `upcycle` copies one dense layer to every expert; `experts` lists one source per expert.
    names = take.experts or take.origins * shape[0]
    return {(e,): sources[name].piece(part.dense) for e, name in enumerate(names)}


def needed_sources(takes: Sequence[Take]) -> list[str]:
    """Names of all sources except `fresh`, each once, in the order in which they are named."""
    names = [name for take in takes for name in take.origins]
    return [name for name in dict.fromkeys(names) if name != "fresh"]
