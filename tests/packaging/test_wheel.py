"""A wheel holds the package, its run files and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

from unimoe_jax.config.load import run_file_names


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


@pytest.fixture
def installed(clone: Path, tmp_path: Path) -> Path:
    """The folder of programs of a fresh environment in which the wheel is installed."""
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    borrowed = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, clone], cwd=tmp_path, env=borrowed, check=True)
    return python.parent


@pytest.mark.slow
def test_an_installed_package_works_in_an_empty_folder(installed, tmp_path, cache):
    """`unimoe` finds its run files by name, makes its data and trains, far from any clone."""
    folder = tmp_path / "empty"
    folder.mkdir()
    # The dependencies are borrowed from the environment of the tests.
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": sysconfig.get_path("purelib"), "XDG_CACHE_HOME": str(cache)}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}

    def unimoe(*arguments: str) -> str:
        command = [str(installed / "unimoe"), *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "train" in unimoe("--help")
    for name in run_file_names():
        assert f"name = {json.dumps(name)}" in unimoe("train", "--config", name, "--print-config")
    steps = [f"stages.{n}.optim.steps=1" for n in range(6)]
    held_out = [f"stages.{n}.evaluate=[]" for n in range(6)]
    printed = unimoe("train", "--config", "tiny", *steps, *held_out, "log.plots=false")
    assert "tiny: finished" in printed
    assert (folder / "runs/tiny/summary.json").is_file()
