"""A path -> the checkpoint that it stands for, with settings, tokenizer and template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unimoe_jax.checkpoints.checksums import CheckpointError, check_files
from unimoe_jax.checkpoints.locate import locate
from unimoe_jax.checkpoints.manifest import MANIFEST, read_manifest, read_settings, run_file_of
from unimoe_jax.config import ConfigError, ModelConfig, RunConfig, StageConfig
from unimoe_jax.config.load import load_config
from unimoe_jax.config.problems import first_problem
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.data.conversation import TEMPLATES
from unimoe_jax.data.sources import has_too_many_pieces, load_tokenizer
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.generate.errors import GenerationError

MODEL_FILE, GENERATION_FILE = "model.yaml", "generation_config.json"
TEMPLATE_OF_FAMILY = (("unimoe", "vicuna_v1"), ("cumo", "mistral_instruct_system"))
"""(beginning of the family's name, template of its conversations)."""


@dataclass(frozen=True)
class Found:
    """A checkpoint, its parameters not read yet.

    folder: holds params and manifest. template: how conversations are written. generation: content
    of generation_config.json, empty if there is none.
    """

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    template: str
    generation: Mapping[str, Any]


def find(path: Path, template: str | None) -> Found:
    """The checkpoint that `path` stands for (`checkpoints.locate`); its parameters are not read.

    template: None takes the template that the checkpoint was trained with.

    Raises:
        GenerationError: there is no model that can answer; the message says what is missing.
    """
    if not path.is_dir():
        raise GenerationError(f"{path}: no such folder; give a run directory or a checkpoint")
    try:
        located = locate(path)
    except CheckpointError as error:
        raise GenerationError(str(error)) from error
    if not located.is_checkpoint:
        raise GenerationError(
            f"{path}: neither config.yaml of a run nor {MANIFEST} of a checkpoint; PyTorch folders "
            "are converted first: python -m unimoe_jax.convert import --from … --to …"
        )
    folder = located.folder
    if (folder / MODEL_FILE).is_file():
        return _of_import(folder, template)
    run_file = run_file_of(folder)
    if run_file is None:
        raise GenerationError(
            f"{folder}: no {MODEL_FILE}, and no run's config.yaml three folders up; the model's "
            "settings are unknown"
        )
    run, name = _run(run_file), read_manifest(folder).get("stage")
    stage = next((stage for stage in run.stages if stage.name == name), None)
    if stage is None:
        raise GenerationError(f"{folder}: {run_file} has no stage {name}")
    return _of_run(run, stage, folder, template)


def _run(file: Path) -> RunConfig:
    try:
        return load_config(file)
    except ConfigError as error:
        raise GenerationError(str(error)) from error


def _of_run(run: RunConfig, stage: StageConfig, folder: Path, template: str | None) -> Found:
    settings = resolve_stage(run, stage)
    tokenizer, file = load_tokenizer(run)
    if template is None and settings.template == "plain":
        raise GenerationError(
            f"{folder}: stage {stage.name} learned captions (template plain), not conversations; "
            "choose a template, e.g. --template vicuna_v1"
        )
    side = file.parent / GENERATION_FILE
    generation = _json(side) if side.is_file() else {}
    return Found(folder, settings.model, tokenizer, template or settings.template, generation)


def _of_import(folder: Path, template: str | None) -> Found:
    """A checkpoint that `unimoe_jax.convert import` wrote, with its settings beside it."""
    check_files(folder)  # verify checksums before any file is parsed
    manifest = read_manifest(folder)
    config = _model_config(folder / MODEL_FILE)
    # The template: the user's choice, or the manifest's, or that of the family.
    family = str(manifest.get("family", ""))
    known = manifest.get("template") or next(
        (name for start, name in TEMPLATE_OF_FAMILY if family.startswith(start)), None
    )
    if template is None and known not in TEMPLATES:
        raise GenerationError(
            f"{folder}: no template is known for family {family!r}; choose one with --template"
        )
    # JAX clamps indices that are out of range, so every id beyond the embedding would silently read
    # its last row.
    tokenizer, rows = _tokenizer(folder), config.decoder.vocab_size
    if has_too_many_pieces(tokenizer, rows):
        raise GenerationError(
            f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces, but the model's "
            f"vocab_size is {rows}; copy the tokenizer.model that belongs to it there"
        )
    file = folder / GENERATION_FILE
    generation = _json(file) if file.is_file() else {}
    return Found(folder, config, tokenizer, template or str(known), generation)


def _model_config(file: Path) -> ModelConfig:
    """The settings of a whole model.

    Raises:
        GenerationError: the file holds only a part of a model, such as an encoder.
    """
    try:
        return ModelConfig.model_validate(read_settings(file))
    except ValidationError as error:
        raise GenerationError(
            f"{file}: not a whole model: {first_problem(error)}; generation needs embedding, "
            "decoder and head"
        ) from error


def _tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a converted checkpoint."""
    try:
        return Tokenizer.load(folder)
    except FileNotFoundError as error:
        raise GenerationError(f"{folder}: {error}; copy tokenizer.model there") from error
    except (RuntimeError, ValueError, AttributeError) as error:
        # SentencePiece raises RuntimeError; a damaged tokenizer_config.json raises the others.
        raise GenerationError(
            f"{folder}: its tokenizer cannot be read: {' '.join(str(error).split())}; copy "
            "tokenizer.model and tokenizer_config.json again from the source"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise GenerationError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise GenerationError(f"{file}: expected a JSON object, {{…}}")
    return content
