"""A run directory and an import that commit 981c4dc wrote, before modules were moved, still load.

`fixtures/first_run` was trained with `first_run.yaml`, and `fixtures/first_import` was converted
from the CuMo folder in tests/parity/fixtures. Formats may grow, but what users have on disk must
stay readable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.convert.opening import open_checkpoint
from unimoe_jax.generate.loader import load
from unimoe_jax.generate.request import ask

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_folder(tmp_path, cache, monkeypatch) -> Path:
    """A working directory with the run in `out`, where the run file has its output."""
    shutil.copytree(FIXTURES / "first_run", tmp_path / "out")
    shutil.copy(FIXTURES / "first_run.yaml", tmp_path)
    # The run reads its data from the cache folder of the user.
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_first_run_answers(run_folder):
    (answer,) = load(run_folder / "out").generate([ask("What is this?")])
    assert isinstance(answer.text, str)


def test_a_first_import_is_read_completely():
    checkpoint = open_checkpoint(FIXTURES / "first_import")
    assert checkpoint.config["vision"]["encoder"]["moe"]["num_experts"] == 4
    assert len(checkpoint.params) == 44
    assert all(np.isfinite(param.read(())).all() for param in checkpoint.params.values())


@pytest.mark.slow
def test_an_interrupted_first_run_goes_on(run_folder):
    """The same command continues a run that commit 981c4dc stopped at step 4 of stage `two`."""
    layout = RunLayout(run_folder / "out")
    expected = load_final(layout.stage("two").final)
    shutil.rmtree(layout.stage("two").final)
    layout.stage("two").summary.unlink()
    layout.summary.unlink()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "unimoe_jax.train", "--config", "first_run.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "one: finished before" in done.stdout
    actual = load_final(layout.stage("two").final)
    assert actual.keys() == expected.keys()
    # The two remaining steps may round differently on another processor.
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=1e-4, atol=1e-6, err_msg=path)
