"""Whether the folders that the package writes can be written, and how much space is left there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from unimoe_jax.doctor.checks import Check, format_bytes

FOLDERS = "folders"
TOO_FULL = 2**30
NEARLY_FULL = 10 * 2**30
"""Bytes. The training state of a small model takes a few of these; large models take far more."""


def check_cache_folder(cache: str | None) -> Check:
    """The folder of `data.cache`; `cache` is the setting, None for its default."""
    try:
        from unimoe_jax.config.cache import cache_folder
    except ImportError as error:  # a missing package, which another check reports
        value = f"not checked, because the settings cannot be imported ({error})"
        return Check(FOLDERS, "cache", "warning", value, "mend the failures above first")
    remedy = "set data.cache or XDG_CACHE_HOME to a folder that can be written"
    return check_folder("cache", cache_folder(cache), remedy)


def check_run_folder(output: str) -> Check:
    """The folder in which runs are made."""
    remedy = "set output=FOLDER/{name} in the run to a folder that can be written"
    return check_folder("runs", Path(output).expanduser(), remedy)


def check_folder(name: str, folder: Path, remedy: str) -> Check:
    """Whether files can be written and locked in `folder`, which need not exist; and free space.

    A folder that does not exist is not made: its nearest parent is checked instead.
    """
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        value = f"{folder} cannot be made: {existing} is not a folder"
        return Check(FOLDERS, name, "failure", value, f"remove that file, or {remedy}")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        value = f"{folder} cannot be written ({error.strerror or error})"
        return Check(FOLDERS, name, "failure", value, remedy)
    return _check_space(name, folder, shutil.disk_usage(existing).free, remedy)


def _check_space(name: str, folder: Path, free: int, remedy: str) -> Check:
    value = f"{folder} can be written, {format_bytes(free)} free"
    remedy = f"free some space, or {remedy}"
    if free < TOO_FULL:
        return Check(FOLDERS, name, "failure", f"{value}, which is too little", remedy)
    if free < NEARLY_FULL:
        return Check(FOLDERS, name, "warning", f"{value}, which is little", remedy)
    return Check(FOLDERS, name, "ok", value)
