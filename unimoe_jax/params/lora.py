"""Low-rank adapters: which parameters belong to one, and how adapters are merged into kernels.

All functions are pure and take parameters as {path: array}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unimoe_jax.config import LoRARule
from unimoe_jax.params.paths import ParamError

Array = Any


def is_adapter(path: str) -> bool:
    """Whether the parameter at `path` is one of the two matrices of an adapter."""
    return path.endswith(("/lora_a", "/lora_b"))


def scale_of(module_path: str, rules: Sequence[LoRARule]) -> float:
    """The factor alpha / rank of the adapter on the layer `module_path`.

    Raises:
        ParamError: no rule matches the path, so the factor is unknown.
    """
    for rule in rules:
        if re.fullmatch(rule.match, module_path):
            return rule.alpha / rule.rank
    raise ParamError(
        f"no LoRA rule of the model matches {module_path!r}, so the scale of its adapter is unknown"
    )


def modules(flat: Mapping[str, Array]) -> list[str]:
    """Paths of the layers that have an adapter."""
    return [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]


def merge(flat: Mapping[str, Array], rules: Sequence[LoRARule]) -> dict[str, Array]:
    """Replace every adapted kernel by kernel + alpha/rank · A B and remove the adapters.

    Leading axes, those of stacked layers and experts, are batch axes of the product. The sum is
    taken in float32 and cast back to the kernel's dtype. Arrays may be numpy's or jax's, also while
    jax traces (arXiv 2106.09685, section 4.1).

    Raises:
        ParamError: no rule matches an adapted layer.
    """
    merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for module in modules(flat):
        kernel, a, b = (flat[f"{module}/{name}"] for name in ("kernel", "lora_a", "lora_b"))
        # In float32, because a small update would be lost when it is added in bfloat16.
        update = scale_of(module, rules) * (a.astype(np.float32) @ b.astype(np.float32))
        merged[f"{module}/kernel"] = (kernel.astype(np.float32) + update).astype(kernel.dtype)
    return merged
