"""manifest.json of a checkpoint and the model settings that are stored beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from unimoe_jax.checkpoints.checksums import ORIGINAL, CheckpointError, check_files
from unimoe_jax.config import ConfigError
from unimoe_jax.config.yaml_dialect import parse

MANIFEST = "manifest.json"


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
    """config.yaml of the run that RUN/checkpoints/STAGE/final belongs to, None where there is none.

    A link may lead into a run, or out of it where checkpoints are kept elsewhere: what counts is
    where the folder is named, then where it lies.
    """
    for place in (Path(os.path.abspath(final)), final.resolve()):
        file = place.parent.parent.parent / "config.yaml"
        if file.is_file():
            return file
    return None


def read_settings(file: Path) -> dict[str, Any]:
    """Model settings in a YAML file: what stands under `model`, else all of it.

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
