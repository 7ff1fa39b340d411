"""The tiny run with fewer steps: compiled once, on more devices, stopped and continued."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.runs.tiny_run import STAGES, command, environment, metrics, train
from unimoe_jax.checkpoints.final import load_final


def short(steps: int) -> list[str]:
    """Overrides: few steps per stage, rows in eight pool groups, and a record of every step."""
    return [
        *(f"stages.{stage}.optim.steps={steps}" for stage in STAGES),
        *("data.loader.groups=8", "log.every=1", "log.plots=false", "log.tensorboard=false"),
        # One stage groups its batches by modality, so it has two signatures and two programs.
        "stages.expert_image.loader={row_length: 240, rows: 8, groups: 8}",
    ]


@pytest.fixture(scope="session")
def reduced_run(tmp_path_factory, cache) -> tuple[Path, str]:
    """A finished run of four steps per stage: its directory, and the text that it printed."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, train(folder, cache, *short(4), quick=True)


@pytest.fixture(scope="session")
def reduced(reduced_run) -> Path:
    return reduced_run[0]


def test_nothing_is_compiled_after_the_first_step(reduced_run):
    _, printed = reduced_run
    assert "Compiling jit(step)" in printed
    for stage in STAGES:
        steps = printed.split(f"{stage} 1/4")[1].split(f"{stage} 4/4")[0]
        assert "Compiling" not in steps, stage


def test_eight_devices_equal_one(reduced, cache, tmp_path):
    folder = tmp_path / "eight"
    mesh = "mesh={data: 2, fsdp: 2, expert: 2, tensor: 1}"
    train(folder, cache, *short(4), mesh, devices=8, quick=True)
    one, eight = metrics(reduced), metrics(folder)
    assert [(r["stage"], r["step"]) for r in one] == [(r["stage"], r["step"]) for r in eight]
    for expected, actual in zip(one, eight, strict=True):
        assert actual["signature"] == expected["signature"]
        np.testing.assert_allclose(
            actual["loss"], expected["loss"], rtol=2e-4, err_msg=str(expected)
        )


def test_resume_is_bit_exact(reduced, cache, tmp_path):
    """After a SIGTERM in the last stage, the same command continues and gives the same numbers."""
    folder = tmp_path / "stopped"
    arguments = [*short(4), "checkpoint.every=100"]
    process = subprocess.Popen(
        command(folder, cache, *arguments),
        env=environment(quick=True),
        stdout=subprocess.PIPE,
        text=True,
    )
    # Wait for the first record of the last stage.
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (log.exists() and '"stage": "tune", "step": 1,' in log.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "SIGTERM: saved" in printed
    assert not (folder / "checkpoints/tune/final").exists()
    train(folder, cache, *arguments, quick=True)

    def comparable(records: list[dict]) -> list[dict]:
        # These depend on the speed of the machine.
        timed = ("time", "tokens_per_s", "data_wait_share")
        return [{k: v for k, v in r.items() if k not in timed} for r in records]

    def last_losses(folder: Path) -> list[float]:
        stages = json.loads((folder / "summary.json").read_text())["stages"]
        return [stage["last_loss"] for stage in stages.values()]

    assert comparable(metrics(folder)) == comparable(metrics(reduced))
    assert last_losses(folder) == last_losses(reduced)
    for stage in STAGES:
        uninterrupted = load_final(reduced / "checkpoints" / stage / "final")
        resumed = load_final(folder / "checkpoints" / stage / "final")
        assert uninterrupted.keys() == resumed.keys()
        for path, value in uninterrupted.items():
            np.testing.assert_array_equal(resumed[path], value, err_msg=f"{stage} {path}")
