"""A wheel holds the package, its run files and nothing else."""

from __future__ import annotations

import subprocess
import sys
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest


def list_files(folder: Path) -> set[str]:
    """The paths of all files of a folder, relative to the folder above it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder.parent).as_posix() for path in files}


@pytest.mark.slow
def test_the_wheel_holds_package_and_run_files(clone, tmp_path):
    modules = list_files(clone / "unimoe_jax")
    configs = {f"unimoe_jax/{path}" for path in list_files(clone / "configs")}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", tmp_path / "dist", clone], check=True)

    [path] = (tmp_path / "dist").iterdir()
    with ZipFile(path) as wheel:
        names = set(wheel.namelist())
        [info] = {name.split("/")[0] for name in names if ".dist-info/" in name}
        described = message_from_bytes(wheel.read(f"{info}/METADATA"))
        commands = wheel.read(f"{info}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(info)} == modules | configs
    assert "unimoe_jax/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert described["License-Expression"] == "Apache-2.0"
    assert "unimoe = unimoe_jax.cli.__main__:main" in commands
