"""Write files whole or not at all, and report write errors in one line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_TENSORSTORE = re.compile(r"([^:\[]*)\[os[ _]error", re.IGNORECASE)


class WriteError(RuntimeError):
    """Something that cannot be written; the message says where and why."""


@contextlib.contextmanager
def raising_write_errors(what: Path, then: str = "") -> Iterator[None]:
    """What goes wrong while `what` is written is a WriteError; faults of programs stay as they are.
    `then` ends its message.

    Raises:
        WriteError: as the operating system says.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        found = _TENSORSTORE.search(str(error))  # it raises ValueError
        if found is None and not isinstance(error, OSError):
            raise
        reason = found[1].strip() if found else error.strerror or str(error)
        if isinstance(error, OSError) and error.filename:  # maybe a source that cannot be read
            reason += f": {error.filename}"
        raise WriteError(f"{what}: cannot be written ({reason}){then}") from error


@contextlib.contextmanager
def with_filename(path: Path | str) -> Iterator[None]:
    """An OSError names `path` where it names nothing, as those of an open file do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def jsonable(value: Any) -> Any:
    """`value` with arrays as lists, NaN and infinities as strings. TypeError for anything odd."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(child) for child in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "__array__"):  # numpy and jax arrays and scalars, bfloat16 too
        array = np.asarray(value)
        return jsonable(
            array.tolist() if array.dtype.kind in "biuf" else array.astype(float).tolist()
        )
    raise TypeError(f"{type(value).__name__} cannot be logged: {value!r}")


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON to `path`; readers see the old file or the new one, never half."""
    write_text_atomic(Path(path), json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 beside `path`, syncs it to disk and renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with with_filename(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
