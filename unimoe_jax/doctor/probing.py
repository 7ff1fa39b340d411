"""Runs probe.py in other processes, and reads their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unimoe_jax.doctor import probe


class Outcome(NamedTuple):
    """How a probe ended.

    Attributes:
        results: what it reported, in order.
        end: why it ended early, as `did not finish within 120 s`; "" if it ended by itself.
        log: everything it printed to standard error.
    """

    results: list[dict[str, Any]]
    end: str
    log: str


def run_probe(arguments: Sequence[str], timeout: float) -> Outcome:
    """Run `probe.py ARGUMENTS` for at most `timeout` seconds."""
    # -P: the folder of probe.py is not searched for modules, since its names are common words.
    command = [sys.executable, "-P", str(Path(probe.__file__)), *arguments]
    # The doctor must not take memory of an accelerator away from a run that is using it.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        process = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        end = f"did not finish within {timeout:g} s"
        return Outcome(_results(error.stdout), end, _text(error.stderr))
    end = _describe_exit(process.returncode)
    return Outcome(_results(process.stdout), end, _text(process.stderr))


def import_errors(modules: Sequence[str], timeout: float) -> dict[str, str | None]:
    """Import modules in another process: module -> error, None for those that can be imported.

    A module that ends the process, or does not finish, is blamed for it; the modules after it are
    then imported in a new process.
    """
    errors: dict[str, str | None] = {}
    remaining = list(modules)
    while remaining:
        outcome = run_probe(["imports", *remaining], timeout)
        reported = {result["module"]: result["error"] for result in outcome.results}
        errors |= reported
        remaining = [module for module in remaining if module not in reported]
        if remaining:
            errors[remaining.pop(0)] = outcome.end or "ended the Python process"
    return errors


def _results(output: bytes | None) -> list[dict[str, Any]]:
    lines = _text(output).splitlines()
    return [json.loads(line.removeprefix(probe.MARK)) for line in lines if probe.MARK in line]


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")


def _describe_exit(code: int) -> str:
    """Why a process ended with an exit code; "" for code 0."""
    if code >= 0:
        return f"ended the Python process with exit code {code}" if code else ""
    try:
        name = signal.Signals(-code).name
    except ValueError:  # real-time signals have no name
        name = f"signal {-code}"
    return f"ended the Python process with {name}"
