"""manifest.json of a checkpoint and the model settings that are stored beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimoe_jax.checkpoints.checksums import ORIGINAL, CheckpointError, check_files
from unimoe_jax.checkpoints.layout import run_around
from unimoe_jax.config import ConfigError
from unimoe_jax.config.yaml_dialect import parse

MANIFEST = "manifest.json"
NAME_A_RESULT = "name what a stage left, RUN/checkpoints/STAGE/final"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage or an import.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}; not a finished stage")
    check_files(folder, MANIFEST)
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}; {ORIGINAL}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no object of settings; {ORIGINAL}")
    return content


def run_file_of(final: Path) -> Path | None:
    """config.yaml of the run that RUN/checkpoints/STAGE/final belongs to; None if there is no run.

    `final` may be reached by a symbolic link into a run, and a run may keep its checkpoints
    elsewhere behind a link. So the folders around the path as it is written are tried first, then
    those around the folder that it leads to.
    """
    for place in (Path(os.path.abspath(final)), final.resolve()):
        file = run_around(place).config
        if file.is_file():
            return file
    return None


def read_run_file(file: Path) -> Mapping[str, Any]:
    """`model` and `stages` of a run's config.yaml as they are written there.

    The other settings are not checked, because runs of other versions may have other ones.

    Raises:
        CheckpointError: the file cannot be read, or is no run's.
    """
    try:
        run = parse(file.read_text(), str(file))
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}; {NAME_A_RESULT}") from error
    try:
        is_run = isinstance(run["model"], dict)
        is_run &= all(isinstance(stage["name"], str) for stage in run["stages"])
    except (KeyError, TypeError):
        is_run = False
    if not is_run:
        raise CheckpointError(f"{file}: lacks a run's `model` and `stages`; {NAME_A_RESULT}")
    return run


def read_settings(file: Path) -> dict[str, Any]:
    """Model settings in a YAML file: the mapping under `model`, or the whole file without that key.

    Raises:
        CheckpointError: there is no such file, or it holds no settings.
    """
    try:
        content = parse(file.read_text(), str(file))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; give a model.yaml") from None
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        named = "" if str(file) in str(error) else f"{file}: "
        raise CheckpointError(f"{named}{error}") from error
    if isinstance(content, dict):
        content = content.get("model", content)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file}: holds no model settings; give a mapping under `model:`")
    return content
