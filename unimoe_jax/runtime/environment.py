"""env.json: versions, devices and git commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    *("unimoe-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("transformers", "tokenizers", "safetensors", "pydantic", "PyYAML", "rich", "matplotlib"),
    *("tensorboardX", "pillow", "ml_dtypes", "torch", "libtpu"),
)
XLA_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION")


def env_info() -> dict[str, Any]:
    """For env.json: versions, platform, devices, git commit, command line, XLA settings."""
    import jax  # here, so that a report can be written without it

    devices = jax.devices()
    kinds = {d.device_kind: 0 for d in devices}
    for device in devices:
        kinds[device.device_kind] += 1
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": kinds,
        "processes": jax.process_count(),
        "git_commit": git_commit(Path(__file__).parent),
        "command": [sys.executable, *sys.orig_argv[1:]],
        "settings": {name: os.environ[name] for name in XLA_SETTINGS if name in os.environ},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that tracks `folder`, with `+changes`; None outside of one.

    A package installed somewhere below an unrelated checkout is not tracked by it: None.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", os.fspath(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired):  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if git("ls-files", ".") else None
    if commit and git("status", "--porcelain", "--untracked-files=no", "."):
        commit += "+changes"
    return commit
