"""Write files completely or not at all, and report write errors in one line."""

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
"""Finds the reason in TensorStore's report of an error of the operating system."""


class WriteError(RuntimeError):
    """Raised for a file or folder that cannot be written; the message says where and why."""


@contextlib.contextmanager
def raising_write_errors(what: Path, then: str = "") -> Iterator[None]:
    """Turn errors of the operating system while `what` is written into a WriteError.

    Other exceptions pass through. `then` is appended to the message.

    Raises:
        WriteError: with the reason that the operating system gives.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # TensorStore, which writes checkpoints, raises a ValueError for an error of the system.
        match = _TENSORSTORE.search(str(error))
        if match:
            reason = match[1].strip()
        elif isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            raise
        # The file may be another one than `what`, for example a source that cannot be read.
        if isinstance(error, OSError) and error.filename:
            reason += f": {error.filename}"
        raise WriteError(f"{what}: cannot be written ({reason}){then}") from error


@contextlib.contextmanager
def with_filename(path: Path | str) -> Iterator[None]:
    """Let every OSError name a file: `path`, if the error names none.

    Python's errors while an open file is written or closed do not name the file.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def jsonable(value: Any) -> Any:
    """Convert `value` for JSON: arrays become lists, NaN and infinities become strings.

    The strings are "nan", "inf" and "-inf", which `float()` reads back.

    Raises:
        TypeError: the value, or one inside it, has no form in JSON.
    """
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
    if hasattr(value, "__array__"):
        # Arrays and scalars of numpy and jax. Types such as bfloat16 are no numbers to Python, so
        # they are converted to float first.
        array = np.asarray(value)
        return jsonable(
            array.tolist() if array.dtype.kind in "biuf" else array.astype(float).tolist()
        )
    raise TypeError(f"{type(value).__name__} cannot be logged: {value!r}")


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as JSON to `path`; readers see the old file or the new one, never a part."""
    write_text_atomic(Path(path), json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to a file beside `path`, sync it to disk and rename it to `path`.

    The process id is in the temporary name, so two processes do not write the same file.
    """
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
