"""Any supported checkpoint as lazy parameters by path: ours, or sources as an import sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import yaml
from pydantic import ValidationError

from unimoe_jax.checkpoint import MANIFEST, CheckpointError, read_manifest, verify
from unimoe_jax.config import ModelConfig
from unimoe_jax.convert.families import Options, plan_of
from unimoe_jax.convert.family import recognise
from unimoe_jax.convert.importing import MODEL_FILE
from unimoe_jax.convert.plan import read_slice, resolve
from unimoe_jax.convert.reader import ConvertError


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
    return _ours(path, model_file) if is_ours(path) else _source(path)


def _ours(path: Path, model_file: Path | None) -> Checkpoint:
    path = path.absolute()
    try:
        verify(path)
        manifest = read_manifest(path)
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    file = model_file or path / MODEL_FILE
    config = yaml.safe_load(file.read_text()) if file.is_file() else {}
    params = {}
    for name, shape in sorted(manifest["shapes"].items()):
        array = _open_array(path, name)
        if list(array.shape) != list(shape):
            raise ConvertError(
                f"{path}: {name!r} has shape {array.shape}, the manifest says {shape}"
            )
        params[name] = Parameter(tuple(shape), array.dtype.name, _array_reader(array))
    return Checkpoint(path, params, config.get("model", config), manifest)


def _open_array(path: Path, name: str) -> Any:
    store = {"driver": "ocdbt", "base": f"file://{path / 'params'}/", "path": f"{name}/"}
    try:
        return ts.open({"driver": "zarr", "kvstore": store}, read=True, open=True).result()
    except ValueError as error:
        raise ConvertError(f"{path}: {name!r} cannot be read: {error}") from error


def _array_reader(array: Any) -> Callable[[tuple[int, ...]], np.ndarray]:
    return lambda index: np.asarray(
        array[index].read().result() if index else array.read().result()
    )


def _source(path: Path) -> Checkpoint:
    resolution = resolve(plan_of(recognise([path]), Options("keep", "merge")))
    plan = resolution.plan

    def reader(target):
        def read(index: tuple[int, ...]) -> np.ndarray:
            lead = len(next(iter(target.fills)))
            if len(index) >= lead:
                part = read_slice(plan, target.fills[index[:lead]], target.dtype)
                return part[index[lead:]]
            parts = [read((*index, i)) for i in range(target.shape[len(index)])]
            return np.stack(parts)

        return read

    params = {
        name: Parameter(t.shape, t.dtype, reader(t)) for name, t in resolution.targets.items()
    }
    return Checkpoint(path, params, plan.config, {"family": plan.family})
