"""Versions, devices and git commit, which a run records in env.json beside its settings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

# Packages whose versions are recorded, if they are installed.
PACKAGES = (
    *("unimoe-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("transformers", "tokenizers", "safetensors", "pydantic", "PyYAML", "rich", "matplotlib"),
    *("tensorboardX", "pillow", "ml_dtypes", "torch", "libtpu"),
)
XLA_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION")


def env_info() -> dict[str, Any]:
    """Versions, platform, devices, git commit, command line and XLA settings, for env.json."""
    # Imported here, so that programs without computations, such as reports, start without jax.
    import jax

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
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path) -> str | None:
    """The commit of the git checkout that tracks `folder`, or None if no checkout tracks it.

    "+changes" is appended if tracked files in `folder` differ from the commit. A package that is
    installed somewhere below an unrelated checkout is not tracked by it, so the result is None.
    """

    def git(*arguments: str) -> str | None:
        """What the git command prints, or None if it fails."""
        try:
            done = subprocess.run(
                ["git", "-C", os.fspath(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired):
            # There is no git on this machine, or it does not answer.
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if git("ls-files", ".") else None
    if commit and git("status", "--porcelain", "--untracked-files=no", "."):
        commit += "+changes"
    return commit
