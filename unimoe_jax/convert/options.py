"""The choices that the user of an import has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unimoe_jax.convert.reader import ConvertError


@dataclass(frozen=True)
class Options:
    """Choices of an import.

    By default only the routers' adapters are lost, which released inference loses as well.

    lora: `merge` adds PEFT's adapters to their kernels, `keep` makes them parameters. The adapters
        inside the experts of Uni-MoE 8e are always parameters, as in the original.
    router_lora: with `override`, mlp_gates replaces the merged routers, so the routers' adapters
        are lost, as in released inference. With `merge`, the routers' adapters take part, as in
        training. By default `override` if adapters are merged and `merge` if they are kept,
        because a model with separate adapters is meant to be trained or exported again.
    vision_layer: the selected hidden state of a CLIP that is imported without a language model.
    unread_layers: whether the layers after that hidden state are kept; CuMo keeps them.
    numerics: `exact` keeps numbers as the files hold them and merges adapters in float32;
        `released` rounds as the loaders of released Uni-MoE inference do, see
        `tables.unimoe.rounding`.

    Raises:
        ConvertError: `released` together with adapters that are kept apart.
    """

    lora: Literal["merge", "keep"] = "merge"
    router_lora: Literal["override", "merge"] | None = None
    vision_layer: int = -2
    numerics: Literal["exact", "released"] = "exact"
    unread_layers: Literal["drop", "keep"] = "drop"

    def __post_init__(self):
        if self.numerics == "released" and self.lora == "keep":
            raise ConvertError(
                "--numerics released needs --lora merge: released inference merges the adapters "
                "before it rounds"
            )

    @property
    def takes_router_lora(self) -> bool:
        """Whether the routers' adapters take part."""
        # Merged imports imitate released inference, which loses these adapters.
        default = {"keep": "merge", "merge": "override"}[self.lora]
        return (self.router_lora or default) == "merge"
