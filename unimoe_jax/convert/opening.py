"""Open any supported checkpoint as lazy parameters by path.

A checkpoint of this package is read as it is stored. PyTorch folders are seen through the table of
their family, so they appear as the parameters that an import would write.
"""

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
from unimoe_jax.checkpoints.sources import ArrayIndex, ParamSource
from unimoe_jax.config import ConfigError, ModelConfig, RunConfig
from unimoe_jax.config.load import load_config
from unimoe_jax.config.problems import first_problem
from unimoe_jax.convert.family_plans import plan_of
from unimoe_jax.convert.importing import MODEL_FILE
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.plan import (
    ConversionPlan,
    Target,
    parameter_shapes,
    read_slice,
    resolve_plan,
)
from unimoe_jax.convert.reader import ConvertError, np_dtype
from unimoe_jax.convert.recognise import TOKENIZER_FILES, recognise
from unimoe_jax.data import embedded
from unimoe_jax.data.sources import cache_folder

OWN_FILES = {MANIFEST, SUMS, MODEL_FILE}
"""Files that every import and stage writes itself, so they are no side files."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".index.json")


@dataclass(frozen=True)
class Parameter:
    """One parameter that is read when it is needed.

    `read` takes a leading index, for example (layer, expert), and returns that slice; () reads the
    whole parameter.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """The lazy parameters of a checkpoint, and the settings of its model if they are known.

    Attributes:
        path: the folder, for messages.
        params: path -> parameter.
        config: model settings as in model.yaml; empty if they are unknown.
        manifest: manifest.json, or its first entries for PyTorch folders.
        files: name -> tokenizer or processor file that belongs to the model.
        template: the prompt template, if it cannot be derived from the model family.
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
            ConvertError: the settings are unknown, or describe only parts of a model.
        """
        if not self.config:
            raise ConvertError(no_settings(str(self.path)))
        try:
            return ModelConfig.model_validate(self.config)
        except ValidationError as error:
            raise ConvertError(
                f"{self.path}: its settings describe no whole model: {first_problem(error)}"
            ) from error


def no_settings(where: str) -> str:
    """The message for a checkpoint whose model settings are unknown."""
    return (
        f"{where}: no {MODEL_FILE} and not in a run directory; name the model's settings with "
        "--model FILE (a model.yaml)"
    )


def has_text_model(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has every parameter that text logits need.

    The settings are not enough to decide this: a checkpoint with a part of a model may have the
    settings of the whole model.
    """
    if "decoder" not in checkpoint.config:
        return False
    config = {key: value for key, value in checkpoint.config.items() if key in ("decoder", "lora")}
    needed = parameter_shapes(ModelConfig.model_validate(config), [""])
    return needed.keys() <= checkpoint.params.keys()


def locate_checkpoint(path: Path) -> Located:
    """Find the checkpoint that a user's `path` means, see `checkpoints.locate`.

    Raises:
        ConvertError: the path means no checkpoint, or several.
    """
    try:
        return locate(path)
    except CheckpointError as error:
        raise ConvertError(str(error)) from error


def open_checkpoint(
    path: Path, model_file: Path | None = None, options: Options = Options("keep")
) -> Checkpoint:
    """Open a checkpoint of this package, or PyTorch folders as an import with `options` sees them.

    The checkpoint of a stage has no model.yaml. Its settings come from `model_file`, or else from
    the config.yaml of the run directory that contains it.

    Raises:
        ConvertError: the checkpoint is damaged or not recognised, or `model_file` is missing, empty
            or wrong.
    """
    located = locate_checkpoint(path)
    if not located.is_checkpoint:
        return _pytorch_checkpoint(located.folder, options, "source")
    return _own_checkpoint(located.folder, model_file)


def open_pair(a: Path, b: Path) -> tuple[Checkpoint, Checkpoint]:
    """Open two checkpoints that are to be compared.

    If one of them is an import and the other a PyTorch folder, the folder is opened with the
    options of the import, so that equal weights compare as equal.

    Raises:
        ConvertError: as `open_checkpoint`.
    """
    located = (locate_checkpoint(a), locate_checkpoint(b))
    checkpoints = [
        _own_checkpoint(place.folder, None) if place.is_checkpoint else None for place in located
    ]
    options, dtype = Options("keep"), "source"
    for checkpoint in checkpoints:
        if checkpoint is not None and "options" in checkpoint.manifest:
            options = Options(**checkpoint.manifest["options"])
            dtype = checkpoint.manifest["asked_dtype"]
    left, right = (
        checkpoint or _pytorch_checkpoint(place.folder, options, dtype)
        for checkpoint, place in zip(checkpoints, located, strict=True)
    )
    return left, right


def _own_checkpoint(path: Path, model_file: Path | None) -> Checkpoint:
    checkpoint = _stored_checkpoint(path, model_file)
    if checkpoint.config:
        return checkpoint
    return replace(checkpoint, config=_config_of_run(checkpoint))


def _stored_checkpoint(path: Path, model_file: Path | None) -> Checkpoint:
    """A checkpoint as its folder describes it; `config` is empty if no model.yaml is known.

    Raises:
        ConvertError: the folder is damaged, or `model_file` cannot be used.
    """
    path = path.absolute()
    # Checksums first, so that damage is reported as damage and not as a later failure.
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
    # The arrays must have the shapes that the manifest lists, because stages rely on the manifest.
    params = {}
    for name, array in arrays.items():
        shape = tuple(manifest["shapes"][name])
        if array.shape != shape:
            raise ConvertError(
                f"{path}: {name!r} has shape {array.shape}, the manifest says {shape}"
            )
        params[name] = Parameter(shape, array.dtype.name, partial(read_part, array))
    return Checkpoint(
        path,
        params,
        config,
        manifest,
        files=dict(_side_files(path)),
        template=manifest.get("template"),
    )


def _side_files(path: Path) -> Iterator[tuple[str, Path]]:
    """Tokenizer files, processor settings, and any other file beside the parameters."""
    for file in sorted(path.iterdir()):
        if (
            file.is_file()
            and file.name not in OWN_FILES
            and not file.name.endswith(WEIGHT_SUFFIXES)
        ):
            yield file.name, file


def _check_settings(file: Path, config: Mapping[str, Any]) -> None:
    """Check the values of a model file. Parts of a model may be missing, so missing keys pass.

    Raises:
        ConvertError: a value is wrong.
    """
    try:
        ModelConfig.model_validate(config)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if problem["type"] != "missing"]
        if problems:
            where = ".".join(map(str, problems[0]["loc"]))
            raise ConvertError(f"{file}: {where}: {problems[0]['msg']}") from error


# ------------------------------------------------------------------------------- run directories


def _config_of_run(checkpoint: Checkpoint) -> dict[str, Any]:
    """Model settings of a stage's checkpoint, from the run directory that contains it.

    Returns an empty dictionary if no run directory contains the checkpoint.

    Raises:
        ConvertError: config.yaml of the run is damaged, or does not have the stage.
    """
    file = _run_file(checkpoint)
    if file is None:
        return {}
    try:
        run = read_run_file(file)
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    name = checkpoint.manifest["stage"]
    stage = next((stage for stage in run["stages"] if stage["name"] == name), None)
    if stage is None:
        raise ConvertError(f"{file}: has no stage {name!r}, which wrote {checkpoint.path}")
    try:
        model = ModelConfig.model_validate(run["model"])
    except ValidationError as error:
        raise ConvertError(f"{file}: section model: {first_problem(error)}") from error
    # The stage may have added experts and adapters to the run's model. The parameters show which
    # modules have experts; the stage's settings list the rules of its adapters.
    moe_layers = tuple(checkpoint.manifest["moe_layers"])
    source = shapes_source(name, checkpoint.params, moe_layers)
    config = model.with_experts(source.modules()).model_dump(mode="json", exclude_none=True)
    has_adapters = any(path.endswith("/lora_a") for path in checkpoint.params)
    return config | ({"lora": stage["lora"]} if has_adapters else {})


def shapes_source(
    name: str, params: Mapping[str, Parameter], moe_layers: tuple[bool, ...]
) -> ParamSource:
    """A source that finds layers and experts by the shapes of `params`, and that cannot be read."""

    def load(path: str, index: ArrayIndex) -> np.ndarray:
        raise NotImplementedError(f"read {path!r} through its Parameter")

    shapes = {path: param.shape for path, param in params.items()}
    return ParamSource(name, shapes, load, moe_layers)


def _run_file(checkpoint: Checkpoint) -> Path | None:
    """config.yaml of the run whose stage wrote the checkpoint; None for other checkpoints."""
    return run_file_of(checkpoint.path) if "stage" in checkpoint.manifest else None


def with_tokenizer(checkpoint: Checkpoint) -> Checkpoint:
    """Add the prompt template and the tokenizer of the run to a stage's checkpoint.

    A stage does not copy them into its checkpoint, but answering prompts needs both. The tokenizer
    is added only if its files are on this machine. Other checkpoints are returned unchanged.
    """
    file = _run_file(checkpoint)
    try:
        run = load_config(file) if file else None
    except ConfigError:
        # Another version of the package wrote config.yaml. The parameters are usable without it.
        run = None
    if run is None:
        return checkpoint
    # A stage may replace the template that the run's data section names.
    stage_templates = {stage.name: stage.template for stage in run.stages}
    template = stage_templates.get(checkpoint.manifest["stage"]) or run.data.template
    if template == "plain":  # the template for captions, which has no question
        template = None
    files = {**_tokenizer_files(run), **checkpoint.files}
    return replace(checkpoint, files=files, template=template)


def _tokenizer_files(run: RunConfig) -> dict[str, Path]:
    """Name -> tokenizer file of the run; empty if the files are not on this machine."""
    path: Path | None = Path(run.tokenizer)
    if run.tokenizer == "embedded":
        # The embedded data set makes its tokenizer on first use; None if that has not happened.
        path = embedded.made(cache_folder(run.data), size=run.data.embedded_size)
    if path is None:
        return {}
    folder = path if path.is_dir() else path.parent
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return files | ({"tokenizer.model": path} if path.is_file() else {})


# ---------------------------------------------------------------------------------- PyTorch folders


def _pytorch_checkpoint(path: Path, options: Options, dtype: str) -> Checkpoint:
    """PyTorch folders as the parameters that an import with `options` and `dtype` would write."""
    sources = recognise([path])
    resolution = resolve_plan(plan_of(sources, options), dtype)
    plan = resolution.plan
    params = {
        name: Parameter(target.shape, target.dtype, partial(_read_target, plan, target))
        for name, target in resolution.targets.items()
    }
    parents = {source.role: str(source.path) for source in sources}
    manifest = {"family": plan.family, "parents": parents}
    return Checkpoint(path, params, plan.config, manifest, plan.files)


def _read_target(plan: ConversionPlan, target: Target, index: tuple[int, ...]) -> np.ndarray:
    """Read the slice of a parameter at a leading index of any length.

    One source tensor fills one slice at an index of full length, for example (layer, expert). A
    longer index selects a part of that slice; a shorter one stacks slices.
    """
    full_length = len(next(iter(target.fills)))
    if len(index) < full_length:
        size = target.shape[len(index)]
        return np.stack([_read_target(plan, target, (*index, i)) for i in range(size)])
    value = read_slice(plan, target.fills[index[:full_length]])
    return value.astype(np_dtype(target.dtype), copy=False)[index[full_length:]]
