"""The repository and a clean copy of it, for tests that build or install the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("unimoe_jax", "configs")
IGNORED = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what the build reads, in a folder that is named as a clone of the project is."""
    target = tmp_path / "src" / "unimoe_jax"
    target.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=IGNORED)
    return target
