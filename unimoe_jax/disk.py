"""Files that cannot be written, because the disk is full or for another reason, in one line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

_TENSORSTORE = re.compile(r"([^:\[]*)\[os[ _]error", re.IGNORECASE)


class WriteError(RuntimeError):
    """Something that cannot be written; the message says where and why."""


@contextlib.contextmanager
def writing(what: Path, then: str = "") -> Iterator[None]:
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
def named(path: Path | str) -> Iterator[None]:
    """An OSError names `path` where it names nothing, as those of an open file do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
