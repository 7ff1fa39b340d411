"""After an editable install the package is importable from every working directory."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

PRINT_FILE = "import unimoe_jax; print(unimoe_jax.__file__)"
PRINT_CONFIGS = """
from importlib.resources import files
print((files("unimoe_jax") / "configs" / "run" / "tiny.yaml").resolve())
"""


def run_python(python: Path, *arguments: str, folder: Path) -> str:
    """Start an interpreter in a folder without Python's variables, and return what it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), *arguments]
    result = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, f"in {folder}: {result.stderr}"
    return result.stdout.strip()


@pytest.fixture
def python(clone: Path, tmp_path: Path) -> Path:
    """The interpreter of a fresh environment with an editable install of the copied repository."""
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    # The fresh environment has neither pip nor setuptools. It borrows both for the install alone.
    borrowed = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-e", clone], cwd=tmp_path, env=borrowed, check=True)
    return python


@pytest.mark.slow
def test_the_package_is_found_from_every_folder(clone, tmp_path, python):
    """The folder above a clone named unimoe_jax holds a folder of the package's name.

    Python takes that folder for a namespace package unless a regular package is on sys.path. The
    import hook that setuptools installs by default for this layout is asked too late.
    """
    expected = str(clone / "unimoe_jax" / "__init__.py")
    for folder in (clone.parent, clone, tmp_path):
        assert run_python(python, "-c", PRINT_FILE, folder=folder) == expected
    script = clone.parent / "script.py"
    script.write_text(PRINT_FILE)
    assert run_python(python, str(script), folder=tmp_path) == expected


@pytest.mark.slow
def test_an_editable_install_uses_the_run_files_of_the_repository(clone, tmp_path, python):
    expected = str((clone / "configs/run/tiny.yaml").resolve())
    assert run_python(python, "-c", PRINT_CONFIGS, folder=tmp_path) == expected
