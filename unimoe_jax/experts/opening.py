"""A checkpoint as members: every layer's part of every parameter, read one slice at a time."""

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
from unimoe_jax.convert.opening import Checkpoint, Parameter, no_settings, open_checkpoint
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.reader import ConvertError, sha256
from unimoe_jax.convert.recognise import recognise, source_files
from unimoe_jax.params import lora
from unimoe_jax.params.layer_parts import LayerPart, layer_parts


@dataclass(frozen=True)
class Part:
    """One piece of a result: its shape and dtype, where it comes from, its value when asked."""

    shape: tuple[int, ...]
    dtype: str
    origin: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Opened:
    """An opened checkpoint. `name`: for tables; `config`: model settings as in model.yaml."""

    name: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    moe_layers: tuple[bool, ...]

    @property
    def where(self) -> str:
        """For messages."""
        return str(self.checkpoint.path)

    @cached_property
    def source(self) -> ParamSource:
        """Shapes and places; reading goes through `part`."""
        params = self.checkpoint.params
        shapes = {path: param.shape for path, param in params.items()}
        return ParamSource(
            self.where, shapes, lambda path, index: params[path].read(index), self.moe_layers
        )

    @cached_property
    def members(self) -> list[LayerPart]:
        """Everything there is."""
        return [
            member
            for path, param in self.checkpoint.params.items()
            for _, member in layer_parts(path, param.shape, self.moe_layers)
        ]

    def part(self, member: LayerPart, *inner: int) -> Part:
        """`member`, or entry `inner` (an expert) of it. Raises ParamError where it is missing."""
        path, outer = self.source.find(member)
        param, index = self.checkpoint.params[path], (*outer, *inner)
        origin = f"{self.name} expert {inner[0]}" if inner else self.name
        shape = param.shape[len(index) :]
        return Part(shape, param.dtype, origin, lambda: np.asarray(param.read(index)))

    @cached_property
    def _counts(self) -> dict[ModuleName | None, set[int]]:
        counts: dict[ModuleName | None, set[int]] = {}
        for member in self.members:
            if member.expert is not None:
                counts.setdefault(member.module, set()).add(self.part(member).shape[0])
        return counts

    def num_experts(self, module: ModuleName) -> int:
        """Experts in each MoE layer of `module`; 0: there are none.

        Raises:
            ConvertError: layers differ.
        """
        found = sorted(self._counts.get(module, {0}))
        if len(found) > 1:
            raise ConvertError(f"{self.where}: {module} layers have {found} experts")
        return found[0]

    def digests(self) -> dict[str, str]:
        """{file: SHA-256} that tell this checkpoint from any other: of its list of checksums, or of
        its files."""
        path = self.checkpoint.path
        if is_checkpoint(path):
            return {SUMS: sha256(path / SUMS)}
        files = sorted({file for source in recognise([path]) for file in source_files(source)})
        return {str(file): sha256(file) for file in files}


def open_experts(name: str, path: Path, model_file: Path | None = None) -> Opened:
    """A checkpoint of this package, whole or a part, or PyTorch folders that an import takes.

    Adapters are merged as they are read; PyTorch folders are what `import` makes of them.

    Raises:
        ConvertError: not there, damaged or not recognised; ParamError: adapters without a rule.
    """
    if not path.is_dir():
        raise ConvertError(f"{path}: no such folder; give a checkpoint")
    checkpoint = open_checkpoint(path, model_file, Options())
    config = dict(checkpoint.config)
    if is_checkpoint(checkpoint.path):
        moe_layers = tuple(checkpoint.manifest["moe_layers"])
    else:
        moe_layers = checkpoint.model.decoder.moe_layers()
    rules = [LoRARule.model_validate(rule) for rule in config.pop("lora", None) or ()]
    checkpoint = replace(checkpoint, params=without_adapters(checkpoint.params, rules))
    return Opened(name, checkpoint, config, moe_layers)


def without_adapters(
    params: Mapping[str, Parameter], rules: Sequence[LoRARule]
) -> dict[str, Parameter]:
    """The same parameters with every adapter merged into its kernel, slice by slice."""
    merged = {path: param for path, param in params.items() if not lora.is_adapter(path)}
    for module in lora.modules(params):
        lora.scale_of(module, rules)  # raises now, not in the middle of writing
        merged[f"{module}/kernel"] = _merged(params, module, rules)
    return merged


def _merged(params: Mapping[str, Parameter], module: str, rules: Sequence[LoRARule]) -> Parameter:
    paths = [f"{module}/{name}" for name in ("kernel", "lora_a", "lora_b")]

    def read(index: tuple[int, ...]) -> np.ndarray:
        return lora.merge({path: params[path].read(index) for path in paths}, rules)[paths[0]]

    return replace(params[paths[0]], read=read)


def model_text(config: Mapping[str, Any], where: str) -> str:
    """The content of model.yaml, checked where it is a whole model.

    Raises:
        ConvertError: there are no settings; pydantic's ValidationError: they do not fit.
    """
    if not config:
        raise ConvertError(no_settings(where))
    if "decoder" in config:
        ModelConfig.model_validate(config)
    return yaml.safe_dump({"model": dict(config)}, sort_keys=False)
