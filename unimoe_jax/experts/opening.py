"""Open a checkpoint as layer parts: every layer's slice of every parameter, read when needed.

Layer parts are named independently of how layers are stacked (`params.layer_parts`), so a dense
model and a model with experts can be matched part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from unimoe_jax.checkpoints.checksums import SUMS
from unimoe_jax.checkpoints.locate import is_checkpoint
from unimoe_jax.checkpoints.sources import ParamSource
from unimoe_jax.config import LoRARule, ModelConfig, ModuleName
from unimoe_jax.convert.opening import (
    Checkpoint,
    Parameter,
    no_settings,
    open_checkpoint,
    shapes_source,
)
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.reader import ConvertError, sha256
from unimoe_jax.convert.recognise import recognise, source_files
from unimoe_jax.params import lora
from unimoe_jax.params.layer_parts import LayerPart, layer_parts


@dataclass(frozen=True)
class Part:
    """One slice of a new checkpoint.

    Attributes:
        shape, dtype: of the slice.
        origin: where the slice comes from, for the report.
        read: returns the value; nothing is read before.
    """

    shape: tuple[int, ...]
    dtype: str
    origin: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Opened:
    """An opened checkpoint without adapters.

    Attributes:
        name: for reports and the manifest, e.g. "base".
        checkpoint: its lazy parameters.
        config: model settings as in model.yaml, without adapters.
        moe_layers: one flag per decoder layer: True if the layer has experts.
    """

    name: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    moe_layers: tuple[bool, ...]

    @property
    def where(self) -> str:
        """The checkpoint's path, for messages."""
        return str(self.checkpoint.path)

    @cached_property
    def source(self) -> ParamSource:
        """Finds the parameter and index of a layer part; `part` reads it."""
        return shapes_source(self.where, self.checkpoint.params, self.moe_layers)

    @cached_property
    def layer_parts(self) -> list[LayerPart]:
        """The layer parts of all parameters. A part of experts stands for all experts."""
        return [
            layer_part
            for path, param in self.checkpoint.params.items()
            for _, layer_part in layer_parts(path, param.shape, self.moe_layers)
        ]

    def part(self, layer_part: LayerPart, *expert: int) -> Part:
        """The slice of a layer part, or of one expert of it.

        Raises:
            ParamError: the checkpoint has no such part.
        """
        path, layer_index = self.source.find(layer_part)
        param, index = self.checkpoint.params[path], (*layer_index, *expert)
        origin = f"{self.name} expert {expert[0]}" if expert else self.name
        shape = param.shape[len(index) :]
        return Part(shape, param.dtype, origin, lambda: np.asarray(param.read(index)))

    @cached_property
    def _expert_counts(self) -> dict[ModuleName | None, set[int]]:
        """Module -> the numbers of experts that its layers have."""
        counts: dict[ModuleName | None, set[int]] = {}
        for layer_part in self.layer_parts:
            if layer_part.expert is not None:
                num_experts = self.part(layer_part).shape[0]
                counts.setdefault(layer_part.module, set()).add(num_experts)
        return counts

    def num_experts(self, module: ModuleName) -> int:
        """Number of experts in each MoE layer of `module`, or 0 if it has no MoE layer.

        Raises:
            ConvertError: layers have different numbers of experts.
        """
        counts = sorted(self._expert_counts.get(module, {0}))
        if len(counts) > 1:
            raise ConvertError(
                f"{self.where}: the {module}'s layers have different numbers of experts: {counts}"
            )
        return counts[0]

    def digests(self) -> dict[str, str]:
        """File -> SHA-256, for files that identify the checkpoint.

        The list of checksums identifies a checkpoint of this package. PyTorch folders have no such
        list, so all their weight files are hashed.
        """
        path = self.checkpoint.path
        if is_checkpoint(path):
            return {SUMS: sha256(path / SUMS)}
        files = sorted({file for source in recognise([path]) for file in source_files(source)})
        return {str(file): sha256(file) for file in files}


def open_experts(name: str, path: Path, model_file: Path | None = None) -> Opened:
    """Open a checkpoint of this package or PyTorch folders; either may hold a part of a model.

    Adapters are merged into their kernels when the kernels are read. PyTorch folders are opened as
    the parameters that `import` would write.

    Args:
        name: for reports and the manifest.
        path: the checkpoint, a run directory, or a PyTorch folder.
        model_file: model.yaml, for a checkpoint without settings.

    Raises:
        ConvertError: the checkpoint is missing, damaged or not recognised.
        ParamError: an adapter has no rule that gives its scale.
    """
    if not path.is_dir():
        raise ConvertError(f"{path}: no such folder; give a checkpoint")
    checkpoint = open_checkpoint(path, model_file, Options())
    config = dict(checkpoint.config)
    if is_checkpoint(checkpoint.path):
        moe_layers = tuple(checkpoint.manifest["moe_layers"])
    else:
        moe_layers = checkpoint.model.decoder.moe_layers()
    # Take the rules of the adapters out of the settings, because no adapter is left.
    rules = [LoRARule.model_validate(rule) for rule in config.pop("lora", None) or ()]
    checkpoint = replace(checkpoint, params=without_adapters(checkpoint.params, rules))
    return Opened(name, checkpoint, config, moe_layers)


def without_adapters(
    params: Mapping[str, Parameter], rules: Sequence[LoRARule]
) -> dict[str, Parameter]:
    """The same parameters with every adapter merged into its kernel when the kernel is read.

    Raises:
        ParamError: an adapter has no rule that gives its scale.
    """
    merged = {path: param for path, param in params.items() if not lora.is_adapter(path)}
    for module in lora.modules(params):
        lora.scale_of(module, rules)  # an adapter without a rule is an error now, not while writing
        merged[f"{module}/kernel"] = _merged(params, module, rules)
    return merged


def _merged(params: Mapping[str, Parameter], module: str, rules: Sequence[LoRARule]) -> Parameter:
    """The kernel of a linear layer with its adapter merged into every slice that is read."""
    kernel = f"{module}/kernel"
    paths = (kernel, f"{module}/lora_a", f"{module}/lora_b")

    def read(index: tuple[int, ...]) -> np.ndarray:
        return lora.merge({path: params[path].read(index) for path in paths}, rules)[kernel]

    return replace(params[kernel], read=read)


def model_text(config: Mapping[str, Any], where: str) -> str:
    """The content of model.yaml for these settings. Settings of a whole model are checked.

    Raises:
        ConvertError: the settings are unknown.
        pydantic.ValidationError: the settings of a whole model do not fit each other.
    """
    if not config:
        raise ConvertError(no_settings(where))
    # An encoder or a connector alone is no ModelConfig, which needs a decoder.
    if "decoder" in config:
        ModelConfig.model_validate(config)
    return yaml.safe_dump({"model": dict(config)}, sort_keys=False)
