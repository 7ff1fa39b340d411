"""The stages of CuMo as a user runs them, with fewer steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.convert import __main__ as convert
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.experts import __main__ as experts
from unimoe_jax.generate.found import find
from unimoe_jax.stages.upcycle_check import ROUNDING

ROOT = Path(__file__).parents[2]
STEPS = {"base": 2, "pt": 2, "pft": 2, "sft": 24}


def train(folder: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the training program with a few steps per stage."""
    steps = [f"stages.{stage}.optim.steps={count}" for stage, count in STEPS.items()]
    return subprocess.run(
        [
            *(sys.executable, "-m", "unimoe_jax.train", "--config", "configs/run/cumo_tiny.yaml"),
            *(f"output={folder}", f"data.cache={cache}", *steps),
            *("log.every=2", "log.tensorboard=false", "data.loader.rows=4", *arguments),
        ],
        # The run is short, so most of its time would be compilation: optimise little.
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache) -> tuple[Path, str]:
    """A finished run: its directory, and the text that it printed."""
    folder = tmp_path_factory.mktemp("runs") / "cumo"
    done = train(folder, cache, "stages.sft.evaluate=[]")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def manifest(folder: Path, stage: str) -> dict:
    return json.loads((folder / "checkpoints" / stage / "final/manifest.json").read_text())


def test_the_upcycled_model_equals_the_dense_one(finished):
    folder, printed = finished
    assert "sft: connector, encoder upcycled from pft: largest difference" in printed
    assert 0 < manifest(folder, "sft")["upcycled"] < ROUNDING
    assert manifest(folder, "pft")["upcycled"] is None


def test_routers_balance_as_the_published_ones_did(finished):
    """The verdict on the routers is in the summary, on the console and in the report."""
    folder, printed = finished
    routers = json.loads((folder / "summary.json").read_text())["routers"]
    assert set(routers) == {"sft"} and set(routers["sft"]) == {"encoder", "connector"}
    for module, trend in routers["sft"].items():
        assert trend["verdict"] == "falling, balanced, none dead", (module, trend)
        assert f"sft {module}" in printed
    for name in ("aux_losses", "router_entropy", "expert_load_sft"):
        for module in ("encoder", "connector"):
            assert (folder / "plots" / f"{module}_{name}.png").exists()
    assert "falling, balanced, none dead" in (folder / "report.html").read_text()


def test_stages_leave_the_same_parameters_as_the_original(finished):
    """PT leaves its connector, PFT a dense model, and SFT a model whose experts differ by then."""
    folder, _ = finished
    pt, pft, sft = (load_final(folder / f"checkpoints/{s}/final") for s in ("pt", "pft", "sft"))
    assert {path.rsplit("/", 2)[0] for path in pt} == {"vision/connector"}
    assert not [path for path in pft if "/moe/" in path]
    dense = {path for path in pft if "vision/" in path and ("/mlp/" in path or "/fc" in path)}
    assert set(pft) - set(sft) == dense
    experts = sft["vision/encoder/layers/moe/experts/fc1/kernel"]
    before = pft["vision/encoder/layers/mlp/fc1/kernel"]
    assert experts.shape == (len(before), 4, *before.shape[1:])
    for expert in range(4):
        assert 0 < np.abs(experts[:, expert] - before).max() < 0.1
        assert np.abs(experts[:, expert] - experts[:, expert - 1]).max() > 0
    # Nothing reads the output of the last layer, but its routers learn from their losses.
    assert "vision/encoder/unread_layers/moe/router/linear/kernel" in sft


def test_a_stage_that_does_not_start_as_the_dense_model_is_refused(finished, cache, tmp_path):
    """A layer of the experts is fresh instead of upcycled."""
    pft = f"checkpoint:{finished[0]}/checkpoints/pft/final"
    takes = [
        "{match: 'vision/.*/(router|fc2)/.*', source: fresh}",
        f"{{match: 'vision/.*/moe/experts/.*', upcycle: '{pft}'}}",
        f"{{match: '.*', source: '{pft}'}}",
    ]
    done = train(
        tmp_path / "other", cache, "--stage", "sft", f"stages.sft.init=[{', '.join(takes)}]"
    )
    assert done.returncode == 2, done.stdout[-3000:]
    assert "experts/fc2/" in done.stderr and "is not upcycled" in done.stderr
    assert "Traceback" not in done.stderr


def test_models_made_from_a_run_have_its_tokenizer_and_template(finished, tmp_path):
    """`experts` and `convert export` copy what generation needs."""
    of_run = find(finished[0], None)
    made, exported = tmp_path / "made", tmp_path / "exported"
    command = ["--from", str(finished[0]), "--to"]
    assert experts.main(["prune", *command, str(made), "--keep", "0,2"]) == 0
    assert convert.main(["export", *command, str(exported), "--format", "cumo"]) == 0
    of_made = find(made, None)
    assert of_made.template == of_run.template
    for folder in (made, exported):
        assert Tokenizer.load(folder).fingerprint == of_run.tokenizer.fingerprint
