"""Run `configs/run/tiny.yaml` as a user does, in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/run/tiny.yaml"
STAGES = ("base", "align", "expert_image", "expert_speech", "expert_sound", "tune")


def command(folder: Path, cache: Path, *arguments: str) -> list[str]:
    """The command that trains the tiny run into `folder`."""
    return [
        *(sys.executable, "-m", "unimoe_jax.train", "--config", str(TINY)),
        *(f"output={folder}", f"data.cache={cache}", *arguments),
    ]


def environment(devices: int = 1, quick: bool = False) -> dict[str, str]:
    """Environment variables of a run on `devices` virtual devices.

    quick: compile programs with little effort, for runs of few steps.
    """
    variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    flags = f"--xla_force_host_platform_device_count={devices}"
    flags += " --xla_backend_optimization_level=0" if quick else ""
    return {**os.environ, **variables, "XLA_FLAGS": flags}


def train(folder: Path, cache: Path, *arguments: str, devices: int = 1, quick: bool = False) -> str:
    """Run to the end, and return the text that was printed on both streams, in order."""
    done = subprocess.run(
        command(folder, cache, *arguments),
        env={**environment(devices, quick), "PYTHONUNBUFFERED": "1", "JAX_LOG_COMPILES": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def metrics(folder: Path) -> list[dict]:
    """The records of a run directory."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
