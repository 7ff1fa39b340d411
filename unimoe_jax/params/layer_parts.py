"""One layer's part of a parameter, independent of how layers are stacked."""

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
    def dense(self) -> LayerPart:
        """The parameter of the dense layer that experts' `self` stacks: the decoder's and the
        encoder's layers keep it under `mlp`, a connector is the layer itself."""
        prefix = "" if self.module == "connector" else "mlp/"
        return self._replace(rest=prefix + (self.expert or ""))

    @property
    def experts(self) -> LayerPart | None:
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


def layer_parts(
    path: str, shape: Sequence[int], moe_layers: Sequence[bool]
) -> list[tuple[tuple[int, ...], LayerPart]]:
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
        return [((i,), LayerPart("decoder", n, found[3])) for i, n in enumerate(layers)]
    if found := _ENCODER.fullmatch(path):
        numbers = range(shape[0])
        return [((layer,), LayerPart("encoder", layer, found[2], found[1])) for layer in numbers]
    if found := _CONNECTOR.fullmatch(path):
        return [((), LayerPart("connector", None, found[1]))]
    return [((), LayerPart(None, None, path))]


def locate_part(member: LayerPart, moe_layers: Sequence[bool]) -> tuple[str, tuple[int, ...]]:
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
