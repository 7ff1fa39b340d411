"""Where a stage's parameters start: earlier stages, checkpoints, experts from dense layers, fresh.

Sources may place experts elsewhere than the target (a dense decoder hands over to one with experts
in every second layer), so decoder layers are matched by layer number, not by stacked path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unimoe_jax.config import Take
from unimoe_jax.nn.stack import where_is
from unimoe_jax.params import ParamError, first_match

_STACKED = re.compile(r"decoder/run_(\d+)/block_(\d+)/(.+)")


@dataclass(frozen=True)
class Source:
    """Parameters to take from.

    Attributes:
        name: for messages.
        shapes: path -> shape of everything there is.
        load: path -> array.
        moe_layers: which decoder layers carry experts there.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[str], np.ndarray]
    moe_layers: tuple[bool, ...]

    def layer(self, number: int, rest: str) -> np.ndarray:
        """Parameter `rest` (e.g. `attention/q_proj/kernel`) of decoder layer `number`."""
        if number >= len(self.moe_layers):
            raise ParamError(
                f"{self.name} has {len(self.moe_layers)} decoder layers, layer {number} is wanted"
            )
        place = where_is(self.moe_layers)[number]
        path = f"decoder/{place.prefix}/{rest}"
        if path not in self.shapes:
            raise ParamError(f"{self.name} has no {path!r} (decoder layer {number}, {rest})")
        return self.load(path)[place.index]


def origin_of(path: str, takes: Sequence[Take]) -> Take:
    """The first take that matches.

    Raises:
        ParamError: none matches.
    """
    index = first_match(takes, path, lambda take: take.match)
    if index is None:
        raise ParamError(f"init: nothing says where {path!r} starts; end with '.*': fresh")
    return takes[index]


def gather(
    path: str,
    shape: tuple[int, ...],
    take: Take,
    sources: Mapping[str, Source],
    moe_layers: tuple[bool, ...],
) -> np.ndarray:
    """The value of target parameter `path` from `take`, which is not `fresh`.

    Raises:
        ParamError: the source lacks it or holds another shape; both are named.
    """
    stacked = _STACKED.fullmatch(path)
    if stacked:
        run, block, rest = int(stacked[1]), int(stacked[2]), stacked[3]
        places = where_is(moe_layers)
        layers = [n for n, at in enumerate(places) if (at.run, at.block) == (run, block)]
        value = np.stack([_layer(layer, rest, take, sources) for layer in layers])
    elif take.experts:
        raise ParamError(f"init: {path!r} is no decoder layer, it cannot be made of experts")
    else:
        source = sources[take.source]
        if path not in source.shapes:
            raise ParamError(f"init: {source.name} has no {path!r}; take it from elsewhere")
        value = np.asarray(source.load(path))
    if value.shape != tuple(shape):
        origin = take.source or list(take.experts)
        raise ParamError(f"init: {path!r} needs shape {tuple(shape)}, {origin} has {value.shape}")
    return value


def _layer(layer: int, rest: str, take: Take, sources: Mapping[str, Source]) -> np.ndarray:
    if not take.experts:
        return sources[take.source].layer(layer, rest)
    if not rest.startswith("moe/experts/"):
        raise ParamError(f"init: {take.match!r} assembles experts, but matches {rest!r} as well")
    dense = "mlp/" + rest.removeprefix("moe/experts/")
    return np.stack([sources[name].layer(layer, dense) for name in take.experts])


def needed_sources(takes: Sequence[Take]) -> list[str]:
    """Names of all sources but `fresh`, without repetition, in order of mention."""
    names: list[Any] = []
    for take in takes:
        names += take.experts or (take.source,)
    return [name for name in dict.fromkeys(names) if name != "fresh"]
