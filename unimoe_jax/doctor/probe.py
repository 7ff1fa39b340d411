"""Runs in a separate process, which may crash or hang without harm to the doctor.

    python -P probe.py imports MODULE …
    python -P probe.py devices

Prints one line per result: `MARK` and a JSON object. Lines without the mark come from the modules
that are imported. This file imports nothing of unimoe_jax.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

MARK = "unimoe_jax.doctor: "


def report(result: dict[str, Any]) -> None:
    """Print one result at once, because the next module may end the process."""
    print(MARK + json.dumps(result), flush=True)


def import_modules(names: list[str]) -> None:
    """Import modules in order, and report each: its name and the error, or None."""
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            report({"module": name, "error": describe(error)})
        else:
            report({"module": name, "error": None})


def list_devices() -> None:
    """Start jax's backend and report it with its devices, or the error."""
    try:
        import jax

        devices = [
            {"kind": device.device_kind, "memory": memory_of(device)} for device in jax.devices()
        ]
        report({"backend": jax.default_backend(), "devices": devices})
    except Exception as error:
        report({"error": describe(error)})


def memory_of(device: Any) -> int | None:
    """Bytes of memory that jax may use on a device; None where the backend does not say."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # backends raise errors of several types
        return None


def describe(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


if __name__ == "__main__":
    if sys.argv[1] == "imports":
        import_modules(sys.argv[2:])
    else:
        list_devices()
