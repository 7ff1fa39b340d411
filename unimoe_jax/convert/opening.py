"""Any supported checkpoint as lazy parameters by path: ours, or sources as an import sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from unimoe_jax.checkpoints.checksums import SUMS, CheckpointError, verify
from unimoe_jax.checkpoints.final import open_array, read_part
from unimoe_jax.checkpoints.locate import Located, locate
from unimoe_jax.checkpoints.manifest import (
    MANIFEST,
    read_manifest,
    read_run_file,
    read_settings,
    run_file_of,
)
from unimoe_jax.checkpoints.sources import ParamSource
from unimoe_jax.config import ConfigError, ModelConfig, RunConfig
from unimoe_jax.config.load import load_config
from unimoe_jax.convert.family_plans import plan_of
from unimoe_jax.convert.importing import MODEL_FILE
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.plan import parameter_shapes, read_slice, resolve_plan
from unimoe_jax.convert.reader import ConvertError, np_dtype
from unimoe_jax.convert.recognise import TOKENIZER_FILES, recognise
from unimoe_jax.data import embedded
from unimoe_jax.data.sources import cache_folder

OURS = {MANIFEST, SUMS, MODEL_FILE}
WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")


@dataclass(frozen=True)
class Parameter:
    """One parameter; `read` takes a leading index and returns that slice."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """Lazy parameters, and the model that they are part of where it is known.

    files: name -> tokenizer or processor file that goes with them. template: how it was asked, if
    that is known and does not follow from the family.
    """

    path: Path
    params: Mapping[str, Parameter]
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)
    template: str | None = None

    @property
    def model(self) -> ModelConfig:
        """The whole model.

        Raises:
            ConvertError: no settings, or only parts of a model.
        """
        if not self.config:
            raise ConvertError(no_settings(str(self.path)))
        try:
            return ModelConfig.model_validate(self.config)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConvertError(
                f"{self.path}: its settings describe no whole model: {where}: {first['msg']}"
            ) from error


def no_settings(where: str) -> str:
    """The message for a checkpoint of which nobody says what model it is of."""
    return (
        f"{where}: no {MODEL_FILE} and not in a run directory; name the model's settings with "
        "--model FILE (a model.yaml)"
    )


def has_text_model(checkpoint: Checkpoint) -> bool:
    """Whether it answers to text: parts of a model may come with the settings of all of it."""
    if "decoder" not in checkpoint.config:
        return False
    config = {key: value for key, value in checkpoint.config.items() if key in ("decoder", "lora")}
    needed = parameter_shapes(ModelConfig.model_validate(config), [""])
    return needed.keys() <= checkpoint.params.keys()


def locate_checkpoint(path: Path) -> Located:
    """What `path` stands for (`checkpoints.locate`).

    Raises:
        ConvertError: it stands for nothing, or for several checkpoints.
    """
    try:
        return locate(path)
    except CheckpointError as error:
        raise ConvertError(str(error)) from error


def open_checkpoint(
    path: Path, model_file: Path | None = None, options: Options = Options("keep")
) -> Checkpoint:
    """Parameters of a checkpoint of ours, or of a source as an import with `options` sees it.

    A checkpoint of ours without model.yaml, which is what stages leave, gets its settings from
    `model_file`, else from the run directory that it lies in.

    Raises:
        ConvertError: damaged, or not recognised; no such model file, or nothing in it.
    """
    located = locate_checkpoint(path)
    if not located.is_checkpoint:
        return _source(located.folder, options, "source")
    return _ours(located.folder, model_file)


def open_pair(a: Path, b: Path) -> tuple[Checkpoint, Checkpoint]:
    """Two checkpoints to be compared; a source beside an import of ours is seen as that saw it.

    Raises:
        ConvertError: as `open_checkpoint`.
    """
    pair = (locate_checkpoint(a), locate_checkpoint(b))
    known = [_ours(found.folder, None) if found.is_checkpoint else None for found in pair]
    options, dtype = Options("keep"), "source"
    for found in known:
        if found is not None and "options" in found.manifest:
            options = Options(**found.manifest["options"])
            dtype = found.manifest["asked_dtype"]
    left, right = (
        found or _source(located.folder, options, dtype)
        for found, located in zip(known, pair, strict=True)
    )
    return left, right


def _ours(path: Path, model_file: Path | None) -> Checkpoint:
    found = _written(path, model_file)
    return found if found.config else replace(found, config=_config_of_run(found))


def _written(path: Path, model_file: Path | None) -> Checkpoint:
    path = path.absolute()
    try:
        verify(path)
        manifest = read_manifest(path)
        arrays = {name: open_array(path, name) for name in sorted(manifest["shapes"])}
        file = model_file or path / MODEL_FILE
        config = read_settings(file) if model_file or file.is_file() else {}
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    if model_file:
        _check_settings(model_file, config)
    params = {}
    for name, array in arrays.items():
        shape = tuple(manifest["shapes"][name])
        if array.shape != shape:
            raise ConvertError(
                f"{path}: {name!r} has shape {array.shape}, the manifest says {shape}"
            )
        params[name] = Parameter(shape, array.dtype.name, partial(read_part, array))
    beside, template = dict(_beside(path)), manifest.get("template")
    return Checkpoint(path, params, config, manifest, beside, template)


def _beside(path: Path) -> Iterator[tuple[str, Path]]:
    """Tokenizer and processor settings, and whatever else lies beside the parameters."""
    for file in sorted(path.iterdir()):
        if file.is_file() and file.name not in OURS and not file.name.endswith(WEIGHTS):
            yield file.name, file


def _check_settings(file: Path, config: Mapping[str, Any]) -> None:
    """Raises ConvertError where a value makes no sense; a model's parts may be missing."""
    try:
        ModelConfig.model_validate(config)
    except ValidationError as error:
        wrong = [one for one in error.errors() if one["type"] != "missing"]
        if wrong:
            where = ".".join(map(str, wrong[0]["loc"]))
            raise ConvertError(f"{file}: {where}: {wrong[0]['msg']}") from error


# ------------------------------------------------------------------------------- run directories


def _run(file: Path) -> Mapping[str, Any]:
    """Model and stages of a run's config.yaml. Raises ConvertError if the file is no run's."""
    try:
        return read_run_file(file)
    except CheckpointError as error:
        raise ConvertError(str(error)) from error


def _config_of_run(checkpoint: Checkpoint) -> dict[str, Any]:
    """Model settings of what a stage left, from the run directory it lies in; {} elsewhere."""
    name, file = checkpoint.manifest.get("stage"), _run_file(checkpoint)
    if file is None:
        return {}
    run = _run(file)
    stage = next((stage for stage in run["stages"] if stage["name"] == name), None)
    if stage is None:
        raise ConvertError(f"{file}: has no stage {name!r}, which {checkpoint.path} is of")
    try:
        model = ModelConfig.model_validate(run["model"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("model", *first["loc"])))
        raise ConvertError(f"{file}: {where}: {first['msg']}") from error
    shapes = {path: param.shape for path, param in checkpoint.params.items()}
    moe_layers = tuple(checkpoint.manifest["moe_layers"])
    found = ParamSource(
        name, shapes, lambda path, index: checkpoint.params[path].read(index), moe_layers
    )
    config = model.with_experts(found.modules()).model_dump(mode="json", exclude_none=True)
    adapters = any(path.endswith("/lora_a") for path in shapes)
    return config | ({"lora": stage["lora"]} if adapters else {})


def _run_file(checkpoint: Checkpoint) -> Path | None:
    """The config.yaml of the run that left the checkpoint."""
    return run_file_of(checkpoint.path) if "stage" in checkpoint.manifest else None


def with_tokenizer(checkpoint: Checkpoint) -> Checkpoint:
    """The same with what an answer needs and a stage leaves elsewhere: the run's template, and its
    tokenizer where that is on this machine."""
    file = _run_file(checkpoint)
    try:
        run = load_config(file) if file else None
    except ConfigError:  # a run of another version; its parameters are what was asked for
        run = None
    if run is None:
        return checkpoint
    named = {stage.name: stage.template for stage in run.stages}
    template = named.get(checkpoint.manifest["stage"]) or run.data.template
    if template == "plain":  # captions: nothing was asked
        template = None
    files = {**_tokenizer_files(run), **checkpoint.files}
    return replace(checkpoint, files=files, template=template)


def _tokenizer_files(run: RunConfig) -> dict[str, Path]:
    path: Path | None = Path(run.tokenizer)
    if run.tokenizer == "embedded":
        path = embedded.made(cache_folder(run.data), size=run.data.embedded_size)
    if path is None:
        return {}
    folder = path if path.is_dir() else path.parent
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return files | ({"tokenizer.model": path} if path.is_file() else {})


# ---------------------------------------------------------------------------------- PyTorch folders


def _source(path: Path, options: Options, dtype: str) -> Checkpoint:
    sources = recognise([path])
    resolution = resolve_plan(plan_of(sources, options), dtype)
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
    manifest = {"family": plan.family, "parents": parents}
    return Checkpoint(path, params, plan.config, manifest, plan.files)
