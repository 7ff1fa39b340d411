"""Low-rank adapters as pure tree functions: merging, and what belongs to an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unimoe_jax.config import LoRARule
from unimoe_jax.params.paths import ParamError

Array = Any


def is_adapter(path: str) -> bool:
    """Whether the parameter at `path` is half of an adapter."""
    return path.endswith(("/lora_a", "/lora_b"))


def scale_of(module_path: str, rules: Sequence[LoRARule]) -> float:
    """alpha / rank of the adapter on `module_path`.

    Raises:
        ParamError: no rule matches, so the scale is unknown.
    """
    for rule in rules:
        if re.fullmatch(rule.match, module_path):
            return rule.alpha / rule.rank
    raise ParamError(f"no LoRA rule matches {module_path!r}, its scale is unknown")


def modules(flat: Mapping[str, Array]) -> list[str]:
    """Paths of the layers that have an adapter."""
    return [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]


def merge(flat: Mapping[str, Array], rules: Sequence[LoRARule]) -> dict[str, Array]:
    """kernel + alpha/rank · A B for every adapted layer, adapters removed.

    Works on stacked layers and experts: leading axes are batch axes. The sum is taken in float32
    and cast back to the kernel's dtype. Arrays of numpy or jax, traced too. (arXiv 2106.09685,
    section 4.1.)
    """
    merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for module in modules(flat):
        kernel, a, b = (flat[f"{module}/{name}"] for name in ("kernel", "lora_a", "lora_b"))
        update = scale_of(module, rules) * (a.astype(np.float32) @ b.astype(np.float32))
        merged[f"{module}/kernel"] = (kernel.astype(np.float32) + update).astype(kernel.dtype)
    return merged
