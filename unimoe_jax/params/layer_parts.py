"""One layer's part of a parameter, named independently of how layers are stacked.

A parameter of the decoder stacks the layers of one kind, so the path and index of a layer depend on
which layers carry experts. `layer_parts` names the layers of a parameter, and `locate_part` finds
the path and index of such a name in another model. Upcycling uses both to match a dense model,
which has one stack, with a sparse one, which may have several.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from unimoe_jax.config import ModuleName
from unimoe_jax.nn.stack import where_is
from unimoe_jax.params.paths import ParamError

EXPERTS = "moe/experts/"
ROUTER = "moe/router/"
_DECODER = re.compile(r"decoder/run_(\d+)/block_(\d+)/(.+)")
_ENCODER = re.compile(r"vision/encoder/(layers|unread_layers)/(.+)")
_CONNECTOR = re.compile(r"vision/connector/(.+)")


class LayerPart(NamedTuple):
    """Names one layer's slice of a parameter independently of how layers are stacked.

    module: the module of the part, one of those that may carry experts; None: another module.
    layer: number of the layer within the module; None if the module has no layers.
    rest: the path within the layer, or the whole path if `module` is None.
    stack: "layers" or "unread_layers" in the encoder, which has these two stacks; else empty.
    """

    module: ModuleName | None
    layer: int | None
    rest: str
    stack: str = ""

    @property
    def expert(self) -> str | None:
        """The path within an expert, e.g. "up_proj/kernel"; None if this is no expert's part."""
        return self.rest.removeprefix(EXPERTS) if self.rest.startswith(EXPERTS) else None

    @property
    def is_router(self) -> bool:
        """Whether this is a part of a router."""
        return self.module is not None and self.rest.startswith(ROUTER)

    @property
    def dense(self) -> LayerPart:
        """The dense layer's part that corresponds to this part of experts.

        Layers of the decoder and the encoder have it under `mlp`; the connector is that layer.
        """
        prefix = "" if self.module == "connector" else "mlp/"
        return self._replace(rest=prefix + (self.expert or ""))

    @property
    def experts(self) -> LayerPart | None:
        """The experts' part that corresponds to this dense part, or None if there is none."""
        prefix = "" if self.module == "connector" else "mlp/"
        if self.module is None or self.rest.startswith("moe/") or not self.rest.startswith(prefix):
            return None
        return self._replace(rest=EXPERTS + self.rest.removeprefix(prefix))

    def __str__(self) -> str:
        if self.module is None:
            return self.rest
        layer = "" if self.layer is None else f" {self.stack or 'layer'} {self.layer},"
        return f"{self.module}{layer} {self.rest}"


def layer_parts(
    path: str, shape: Sequence[int], moe_layers: Sequence[bool]
) -> list[tuple[tuple[int, ...], LayerPart]]:
    """Split the parameter `path` into layers: [(leading index, the layer's part)].

    Example: layers 0 and 2 of four carry experts. Then "decoder/run_0/block_0/mlp_norm/scale" holds
    layer 0 at index (0,) and layer 2 at index (1,). In a dense model this path holds all four
    layers, so `locate_part` finds the part of layer 2 there at index (2,).

    Args:
        shape: shape of the parameter; its first number is the number of layers in an encoder.
        moe_layers: one flag per decoder layer: True if the layer carries experts.
    """
    if match := _DECODER.fullmatch(path):
        # The parameter stacks every layer of the model whose place is this run and block.
        run, block, rest = int(match[1]), int(match[2]), match[3]
        layers = [
            layer
            for layer, place in enumerate(where_is(moe_layers))
            if (place.run, place.block) == (run, block)
        ]
        return [((index,), LayerPart("decoder", layer, rest)) for index, layer in enumerate(layers)]
    if match := _ENCODER.fullmatch(path):
        # The encoder's layers are all of one kind, so their numbers are the indices.
        stack, rest = match[1], match[2]
        return [((layer,), LayerPart("encoder", layer, rest, stack)) for layer in range(shape[0])]
    # Connectors are not stacked, and the other modules never carry experts.
    if match := _CONNECTOR.fullmatch(path):
        return [((), LayerPart("connector", None, match[1]))]
    return [((), LayerPart(None, None, path))]


def locate_part(part: LayerPart, moe_layers: Sequence[bool]) -> tuple[str, tuple[int, ...]]:
    """(path, leading index) of a part in the model with these `moe_layers`.

    This is the inverse of `layer_parts`.

    Raises:
        ParamError: the decoder has no such layer.
    """
    if part.module == "decoder":
        assert part.layer is not None
        if part.layer >= len(moe_layers):
            raise ParamError(f"has {len(moe_layers)} decoder layers, layer {part.layer} is wanted")
        place = where_is(moe_layers)[part.layer]
        return f"decoder/{place.prefix}/{part.rest}", (place.index,)
    if part.module == "encoder":
        assert part.layer is not None
        return f"vision/encoder/{part.stack}/{part.rest}", (part.layer,)
    if part.module == "connector":
        return f"vision/connector/{part.rest}", ()
    return part.rest, ()
