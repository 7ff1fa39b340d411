"""The parameters that a stage leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax

from unimoe_jax.config import StageConfig
from unimoe_jax.params import lora
from unimoe_jax.params.paths import Flat
from unimoe_jax.params.table import ParamInfo
from unimoe_jax.stages.stage import Stage


def results(stage: Stage, params: Flat) -> tuple[Flat, list[str]]:
    """(parameters that the stage leaves behind, paths of the trained ones among them).

    `merge_lora` adds the adapters to their kernels; `leaves: trained` keeps only what changed.
    """
    kept, changed = left_behind(stage.settings.config, stage.infos)
    if stage.settings.config.merge_lora:
        params = _merged(stage, params)
    return {path: leaf for path, leaf in params.items() if path in kept}, sorted(changed)


def left_behind(stage: StageConfig, infos: Mapping[str, ParamInfo]) -> tuple[set[str], set[str]]:
    """(paths that the stage leaves behind, the paths among them that it has changed)."""
    kept = set(infos)
    changed = {path for path, info in infos.items() if info.trained}
    if stage.merge_lora:
        # A merged adapter disappears, and the kernel beside it has changed.
        changed |= {path.rsplit("/", 1)[0] + "/kernel" for path in changed if lora.is_adapter(path)}
        kept = {path for path in kept if not lora.is_adapter(path)}
    if stage.leaves == "trained":
        kept &= changed
    return kept, changed & kept


def _merged(stage: Stage, params: Flat) -> Flat:
    """Merge adapters on the devices, kernel by kernel, so that no host has to hold the model."""
    merged = {path: leaf for path, leaf in params.items() if not lora.is_adapter(path)}
    with jax.default_matmul_precision("highest"):
        for module in lora.modules(params):
            kernel = f"{module}/kernel"
            paths = (kernel, f"{module}/lora_a", f"{module}/lora_b")
            layer = {path: params[path] for path in paths}
            merge = partial(lora.merge, rules=stage.settings.model.lora)
            merged |= jax.jit(merge, out_shardings={kernel: stage.shardings[kernel]})(layer)
    return merged
