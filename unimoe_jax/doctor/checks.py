"""The result of one check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "absent", "warning", "failure"]
"""`absent` is an optional part that is not installed. Only a `failure` changes the exit code."""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        section: heading above the line.
        name: name of the thing that was checked.
        value: the state of that thing, such as a version or an amount of memory.
        remedy: what to do; a failure and a warning always have one.
    """

    section: str
    name: str
    status: Status
    value: str
    remedy: str = ""


def has_failed(checks: Iterable[Check]) -> bool:
    """Whether something that was checked would not work."""
    return any(check.status == "failure" for check in checks)


def format_bytes(size: float) -> str:
    """A number of bytes as `512 MiB` or `15.6 GiB`."""
    gib = size / 2**30
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{size / 2**20:,.0f} MiB"
