"""What the user of an import may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unimoe_jax.convert.reader import ConvertError


@dataclass(frozen=True)
class Options:
    """Choices of an import; the defaults lose nothing but what released inference loses.

    lora: merge PEFT's adapters into their kernels, or keep them apart (8e's built-in expert
        adapters always stay apart, as in the originals).
    router_lora: override: mlp_gates replaces the merged routers, so their adapters are lost, as in
        released inference; merge: the routers' adapters take part, as in training. By default
        override where adapters are merged, merge where they are kept: a model with its adapters
        apart is there to be trained on or exported again.
    vision_layer: selected hidden state of a CLIP imported on its own.
    unread_layers: its layers after that one; CuMo keeps them.
    numerics: exact: numbers as the files hold them, adapters merged in float32; released: rounded
        as the loaders of released Uni-MoE inference round them, see `tables.unimoe.rounding`.

    Raises:
        ConvertError: released numerics of a model whose adapters are kept apart.
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
        return (self.router_lora or {"keep": "merge", "merge": "override"}[self.lora]) == "merge"
