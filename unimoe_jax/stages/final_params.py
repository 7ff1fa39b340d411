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
    """(parameters that the stage leaves behind, names of what was trained).

    `merge_lora` adds the adapters to their kernels; `leaves: trained` keeps only what changed.
    """
    left, changed = left_behind(stage.config, stage.infos)
    if stage.config.merge_lora:
        params = _merged(stage, params)
    return {path: leaf for path, leaf in params.items() if path in left}, sorted(changed)


def left_behind(stage: StageConfig, infos: Mapping[str, ParamInfo]) -> tuple[set[str], set[str]]:
    """(paths that the stage leaves behind, those of them that it has changed)."""
    left, changed = set(infos), {path for path, info in infos.items() if info.trained}
    if stage.merge_lora:
        changed |= {path.rsplit("/", 1)[0] + "/kernel" for path in changed if lora.is_adapter(path)}
        left = {path for path in left if not lora.is_adapter(path)}
    if stage.leaves == "trained":
        left &= changed
    return left, changed & left


def _merged(stage: Stage, params: Flat) -> Flat:
    """`lora.merge` where the parameters lie, kernel by kernel: no host need hold them all."""
    merged = {path: leaf for path, leaf in params.items() if not lora.is_adapter(path)}
    with jax.default_matmul_precision("highest"):
        for module in lora.modules(params):
            kernel = f"{module}/kernel"
            own = {path: params[path] for path in (kernel, f"{module}/lora_a", f"{module}/lora_b")}
            merge = partial(lora.merge, rules=stage.model_config.lora)
            merged |= jax.jit(merge, out_shardings={kernel: stage.shardings[kernel]})(own)
    return merged
