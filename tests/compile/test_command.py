"""The command line: its settings, the programs that it compiles, and its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from unimoe_jax.compile.__main__ import PROGRAMS, main
from unimoe_jax.compile.decoding import decoding_program
from unimoe_jax.compile.measure import assumed_batch, parse_media
from unimoe_jax.compile.summary import report_path, verdict
from unimoe_jax.compile.targets import target_devices
from unimoe_jax.config import ConfigError
from unimoe_jax.config.load import load_config
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.parallel.sharding import ShardingError, make_mesh, use_mesh

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests/parallel/multihost.yaml"


def test_batches_are_half_soft_tokens_by_default():
    run = load_config(CONFIG)
    spec, media = assumed_batch(resolve_stage(run, run.stages[0]), 4, None)
    assert spec.token_id_BT.shape == (8, 64)
    # Every one of four pool groups has 128 positions. Half of them are for two media, which have 16
    # tokens per entry.
    assert media == {"image": 2, "video": 2}
    assert spec.image_GIHWC.shape == (4, 2, 48, 48, 3)
    assert parse_media("image=3", run.model) == {"image": 3}
    assert assumed_batch(resolve_stage(run, run.stages[0]), 4, {"image": 3})[0].video_GIFHWC is None


def test_only_optimizer_steps_hold_micro_batches():
    run = load_config(CONFIG, ["stages.tune.optim.accumulate=3"])
    for program, rows in (("train", 24), ("score", 8)):
        spec, _ = assumed_batch(resolve_stage(run, run.stages[0]), 4, None, program)
        assert spec.token_id_BT.shape[0] == rows


@pytest.mark.parametrize(
    "text", ["image", "image=x", "sound=1", "image=1,", "image=0", "image=1,image=2"]
)
def test_bad_media_are_refused(text):
    with pytest.raises(ConfigError, match="NAME=COUNT"):
        parse_media(text, load_config(CONFIG).model)


@pytest.mark.parametrize(
    "topology", ["v9:2x2", "v5p", "cpu:x", "v5p:2by2", "h200:2x4", "cpu:0", "h200:0", "v5e:0x4"]
)
def test_bad_topologies_are_refused(topology):
    with pytest.raises(ConfigError, match="KIND:SHAPE"):
        target_devices(topology)


@pytest.mark.parametrize("flag", ["--rows", "--length"])
@pytest.mark.parametrize("text", ["0", "-4", "x"])
def test_rows_and_length_are_whole_numbers_above_0(flag, text, capsys):
    command = ["--config", str(CONFIG), "--topology", "cpu:1", "--program", "decode"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, f"{flag}={text}"])
    assert stopped.value.code == 2
    assert f"argument {flag}: {text!r} is not a whole number from 1" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-3", "nan", "inf", "x"])
def test_memory_is_a_number_above_0(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(CONFIG), "--topology", "cpu:1", f"--memory={text}"])
    assert stopped.value.code == 2
    assert f"argument --memory: {text!r} is not a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--hlo"])
def test_output_files_are_checked_before_compiling(flag, devices, tmp_path, capsys, monkeypatch):
    def compile_program(*_):
        raise AssertionError("compiled before the output files were checked")

    monkeypatch.setattr("unimoe_jax.compile.__main__.compile_program", compile_program)
    # The effort is a setting of the whole process, so do not change it for later tests.
    monkeypatch.setattr("unimoe_jax.compile.__main__.set_effort", lambda name: None)
    monkeypatch.setattr("unimoe_jax.compile.__main__.target_devices", lambda topology: devices)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for target, said in ((tmp_path, "is a folder"), (tmp_path / "file/x", "cannot be made")):
        arguments = ["--config", str(CONFIG), "--topology", "cpu:8", flag, str(target)]
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {flag} {target}: ") and said in line


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_a_cache_must_divide_over_the_mesh(devices, program):
    """A mesh that divides kernels but not heads can train a model but not generate with it."""
    run = load_config(CONFIG, ["mesh={data: 1, tensor: 2}"])
    mesh = make_mesh(run.mesh, devices[:2])
    said = r"^model.decoder.num_kv_heads = 1 does not divide over mesh.tensor = 2; allowed: 1 "
    with use_mesh(mesh.abstract_mesh), pytest.raises(ShardingError, match=said):
        decoding_program(
            resolve_stage(run, run.stages[0]), mesh, run.mesh.rules, program, rows=2, length=8
        )


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_rows_and_heads_of_a_cache_need_different_axes(devices, program):
    """The checks of parameters do not find this, because parameters have no rows."""
    rules = "mesh={data: 2, rules: {batch: data, kv_heads: data}}"
    run = load_config(CONFIG, [rules, "model.decoder.num_kv_heads=2"])
    mesh = make_mesh(run.mesh, devices[:2])
    said = "the cache of keys and values: .*; change mesh.rules.batch or mesh.rules.kv_heads"
    with use_mesh(mesh.abstract_mesh, run.mesh.rules), pytest.raises(ShardingError, match=said):
        decoding_program(
            resolve_stage(run, run.stages[0]), mesh, run.mesh.rules, program, rows=2, length=8
        )


@pytest.mark.parametrize(
    "program,asked,compiled",
    [
        ("prefill", (8, 100), (8, 128)),
        ("prefill", (8, 2000), (2, 2048)),
        ("decode", (3, 300), (4, 1024)),
    ],
)
def test_programs_of_generation_have_the_reported_sizes(devices, program, asked, compiled):
    changes = {"mesh": "{data: 2}", "model.decoder.max_positions": "4096"}
    run = load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()])
    mesh = make_mesh(run.mesh, devices[:2])
    with use_mesh(mesh.abstract_mesh):
        rows, length = asked
        made = decoding_program(
            resolve_stage(run, run.stages[0]), mesh, {}, program, rows=rows, length=length
        )
        assert (made.rows, made.length) == compiled
        logits, *_ = jax.tree.leaves(made.compile().out_info)
        if program == "prefill":
            assert logits.shape[0] == made.rows


def test_every_program_has_a_report_file():
    names = [str(report_path("run", "tune", "cpu:8", name)) for name in PROGRAMS]
    assert names[0] == "run_tune_cpu_8.json"
    assert names[2:] == ["run_tune_cpu_8_prefill.json", "run_tune_cpu_8_decode.json"]


def test_verdicts():
    report = {"memory": {"sum": 3 * 2**30}}
    assert verdict(report, 4.0) == "fits: 3.00 of 4.00 GiB per device"
    assert verdict(report, 2.5) == "does not fit: 0.50 GiB more than the 2.50 of a device"
    assert verdict(report | {"needed_gib": 5.0}, 4.0).startswith("does not fit: 1.00")


def test_the_command_reports_the_memory_of_a_mesh_of_other_devices(tmp_path):
    path = tmp_path / "report.json"
    command = [
        *(sys.executable, "-m", "unimoe_jax.compile", "--config", str(CONFIG)),
        *("--topology", "cpu:4", "--json", str(path), "--memory", "0.0001"),
        "mesh={data: 1, fsdp: 2, expert: 2}",
    ]
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # the program does not fit into 0.0001 GiB
    report = json.loads(path.read_text())
    assert report["verdict"] in done.stdout
    assert report["mesh"] == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}
    memory, decoder = report["memory"], load_config(CONFIG).model.decoder
    # At least the input of every layer of the decoder, for the rows of one of four devices.
    rows = report["rows"] // 4 * report["row_length"]
    assert memory["activations"] >= decoder.num_layers * rows * decoder.hidden_size * 4
    assert memory["temporaries"] > 0
    # The optimizer holds two float32 copies of the trained parameters, and a few counters.
    assert 0 < memory["optimizer"] - 2 * memory["trained parameters"] < 64
    assert memory["sum"] == sum(size for name, size in memory.items() if name != "sum")
    parts = {tuple(row["shape"]): row["per_device"] for row in report["experts"].values()}
    # Kernels are [layers, experts, width, hidden width]. Experts are split over one axis of the
    # mesh and the width over another.
    assert parts and all(
        part[1] * 2 == shape[1] and np.prod(part) * 4 == np.prod(shape)
        for shape, part in parts.items()
    )
    assert {"all-gather", "all-reduce"} <= {row["op"] for row in report["collectives"]}
    assert 0.9 < report["flops_ratio"] < 2
