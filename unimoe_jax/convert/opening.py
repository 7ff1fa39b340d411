"""Any supported checkpoint as lazy parameters by path: ours, or sources as an import sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from unimoe_jax.checkpoint import (
    MANIFEST,
    CheckpointError,
    open_array,
    read_manifest,
    read_part,
    verify,
)
from unimoe_jax.config import ModelConfig
from unimoe_jax.convert.families import plan_of
from unimoe_jax.convert.family import recognise
from unimoe_jax.convert.importing import MODEL_FILE
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.plan import read_slice, resolve
from unimoe_jax.convert.reader import ConvertError, np_dtype


@dataclass(frozen=True)
class Parameter:
    """One parameter; `read` takes a leading index and returns that slice."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """Lazy parameters, and the model that they are part of where it is known."""

    path: Path
    params: Mapping[str, Parameter]
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def model(self) -> ModelConfig:
        """The whole model.

        Raises:
            ConvertError: no model.yaml, or only parts of a model.
        """
        try:
            return ModelConfig.model_validate(self.config)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConvertError(
                f"{self.path}: {MODEL_FILE} is no whole model: {where}: {first['msg']}"
            ) from error


def is_ours(path: Path) -> bool:
    """Whether `path` was written by this package."""
    return (path / MANIFEST).is_file() and (path / "params").is_dir()


def open_checkpoint(path: Path, model_file: Path | None = None) -> Checkpoint:
    """Parameters of a checkpoint of ours, or of a source as `import --lora keep` sees it.

    Raises:
        ConvertError: damaged, or not recognised.
    """
    return _ours(path, model_file) if is_ours(path) else _source(path, Options("keep"), "source")


def open_pair(a: Path, b: Path) -> tuple[Checkpoint, Checkpoint]:
    """Two checkpoints to be compared; a source beside an import of ours is seen as that saw it.

    Raises:
        ConvertError: as `open_checkpoint`.
    """
    known = [_ours(path, None) if is_ours(path) else None for path in (a, b)]
    options, dtype = Options("keep"), "source"
    for found in known:
        if found is not None and "options" in found.manifest:
            options = Options(**found.manifest["options"])
            dtype = found.manifest["asked_dtype"]
    left, right = (
        found or _source(path, options, dtype) for found, path in zip(known, (a, b), strict=True)
    )
    return left, right


def _ours(path: Path, model_file: Path | None) -> Checkpoint:
    path = path.absolute()
    try:
        verify(path)
        manifest = read_manifest(path)
        arrays = {name: open_array(path, name) for name in sorted(manifest["shapes"])}
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    file = model_file or path / MODEL_FILE
    config = yaml.safe_load(file.read_text()) if file.is_file() else {}
    params = {}
    for name, array in arrays.items():
        shape = tuple(manifest["shapes"][name])
        if array.shape != shape:
            raise ConvertError(
                f"{path}: {name!r} has shape {array.shape}, the manifest says {shape}"
            )
        params[name] = Parameter(shape, array.dtype.name, partial(read_part, array))
    return Checkpoint(path, params, config.get("model", config), manifest)


def _source(path: Path, options: Options, dtype: str) -> Checkpoint:
    sources = recognise([path])
    resolution = resolve(plan_of(sources, options), dtype)
    plan = resolution.plan

    def reader(target):
        def read(index: tuple[int, ...]) -> np.ndarray:
            lead = len(next(iter(target.fills)))
            if len(index) >= lead:
                part = read_slice(plan, target.fills[index[:lead]])
                return part.astype(np_dtype(target.dtype), copy=False)[index[lead:]]
            parts = [read((*index, i)) for i in range(target.shape[len(index)])]
            return np.stack(parts)

        return read

    params = {
        name: Parameter(t.shape, t.dtype, reader(t)) for name, t in resolution.targets.items()
    }
    parents = {source.role: str(source.path) for source in sources}
    return Checkpoint(path, params, plan.config, {"family": plan.family, "parents": parents})
