"""The records, the progress line and env.json."""

import builtins
import errno
import io
import json
import subprocess
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from unimoe_jax.metrics import records
from unimoe_jax.metrics.progress import Progress, format_progress, format_seconds
from unimoe_jax.metrics.records import MetricsWriter
from unimoe_jax.runtime.environment import env_info, git_commit
from unimoe_jax.runtime.files import write_json_atomic


def steps(run_dir, stage):
    return [r["step"] for r in records.read_metrics(run_dir) if r["stage"] == stage]


def test_records_are_valid_json_whatever_the_numbers(tmp_path):
    with MetricsWriter(tmp_path, "align", 10) as writer:
        writer.write(
            1,
            {
                "loss": float("nan"),
                "grad_norm": np.float32("inf"),
                "lr": jnp.bfloat16(0.5),
                "expert_load": np.arange(4).reshape(1, 2, 2),
                "router_entropy": jnp.array([0.5, -np.inf]),
                "signature": "image+text",
                "dropped": np.int64(3),
            },
        )

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert record["stage"] == "align" and record["step"] == 1 and record["total"] == 10
    assert record["loss"] == "nan" and record["grad_norm"] == "inf"
    assert record["router_entropy"] == [0.5, "-inf"] and record["lr"] == 0.5
    assert record["expert_load"] == [[[0, 1], [2, 3]]] and record["dropped"] == 3
    assert record["time"] > 0


def test_odd_values_and_reserved_names_are_errors(tmp_path):
    writer = MetricsWriter(tmp_path, "align", 10)
    with pytest.raises(TypeError, match="object cannot be logged"):
        writer.write(1, {"loss": object()})
    with pytest.raises(ValueError, match="'step'"):
        writer.write(1, {"step": 2})
    writer.close()
    assert records.read_metrics(tmp_path) == []


def test_resuming_removes_later_records_of_that_stage_only(tmp_path):
    for stage in ("align", "tune"):
        with MetricsWriter(tmp_path, stage, 5) as writer:
            for step in range(1, 6):
                writer.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "tune", "st')  # a crash in the middle of a line
    assert steps(tmp_path, "tune") == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, "tune", 5, resumed_step=3) as writer:
        writer.write(4, {"loss": 2.0})
    assert steps(tmp_path, "tune") == [1, 2, 3, 4]
    assert steps(tmp_path, "align") == [1, 2, 3, 4, 5]
    MetricsWriter(tmp_path, "tune", 5).close()
    assert steps(tmp_path, "tune") == []


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1}\nxx\n{}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not JSON.*delete"):
        records.read_metrics(tmp_path)


@pytest.mark.parametrize("line", ["7", "{}", '{"stage": "align"}'])
def test_a_line_that_is_no_record_is_an_error(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 1 is no JSON object with `stage`"):
        records.MetricsWriter(tmp_path, "align", 9)


def test_other_hosts_write_and_print_nothing(tmp_path, capsys):
    with MetricsWriter(tmp_path / "run", "align", 5, tensorboard=True, enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    with Progress("align", 5, enabled=False) as progress:
        progress.announce("compiling")
        progress.update(1, {"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_tensorboard_gets_the_scalars(tmp_path):
    with MetricsWriter(tmp_path, "align", 5, tensorboard=True) as writer:
        writer.write(
            1, {"loss": 1.0, "router_entropy": [0.25, 0.5], "loss_by_modality": {"image": 1.0}}
        )
    (events,) = (tmp_path / "tb" / "align").iterdir()
    content = events.read_bytes()
    for tag in (b"loss", b"router_entropy/01", b"loss_by_modality/image"):
        assert tag in content
    assert dict(records._scalars({"a": {"b": 1}, "c": [[1]], "d": "inf", "e": "x"})) == {
        "a/b": 1.0,
        "d": float("inf"),
    }


def test_missing_tensorboardx_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "tensorboardX":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install tensorboardX.*tensorboard=false"):
        MetricsWriter(tmp_path, "align", 5, tensorboard=True)
    MetricsWriter(tmp_path, "align", 5).close()


# --------------------------------------------------------------------------------- progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(records.time, "monotonic", lambda: now[0])
    return now


def console(**settings):
    return Console(file=io.StringIO(), width=160, highlight=False, **settings)


def test_plain_lines_come_first_last_and_every_few_seconds(clock):
    out = console()
    with Progress("tune", 100, every_seconds=10, console=out) as progress:
        progress.announce("compiling the train step, usually 20-90 s …")
        clock[0] += 30
        for step in range(1, 101):
            values = {"loss": 2.0, "lr": 1e-4, "tokens_per_s": 12345.6, "data_wait_share": 0.25}
            progress.update(step, values | {"balance": 0.01, "grad_norm": 3.0})
            clock[0] += 1
    lines = out.file.getvalue().splitlines()
    assert lines[0] == "tune: compiling the train step, usually 20-90 s …"
    assert lines[1].endswith("done in 30.0 s")
    assert [line.split()[1] for line in lines[2:4]] == ["1/100", "11/100"]
    assert len(lines) == 2 + 11 and lines[-1].startswith("tune 100/100")
    assert lines[3] == (
        "tune  11/100  loss 2.0000  balance 0.01  lr 1.00e-04  12,346 tok/s  data wait 25%  "
        "left 1 m 29 s"
    )


def test_plain_lines_every_n_steps(clock):
    out = console()
    progress = Progress("tune", 9, every_seconds=1e9, every_steps=4, console=out)
    for step in range(1, 10):
        progress.update(step, {"loss": float("nan")})
    lines = out.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/9", "5/9", "9/9"]
    assert "loss nan" in lines[0]


def test_a_terminal_gets_one_live_line():
    out = console(force_terminal=True)
    with Progress("tune", 3, console=out) as progress:
        progress.announce("compiling …")
        for step in range(1, 4):
            progress.update(step, {"loss": 1.0})
    text = out.file.getvalue()
    assert "tune 3/3" in text and "compiling … done in" in text
    assert text.count("tune 3/3") <= 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.21, "4.2 s"),
        (59.97, "1 m 00 s"),
        (200, "3 m 20 s"),
        (3599.8, "1 h 00 m"),
        (7500, "2 h 05 m"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


# ------------------------------------------------------------------------------------- files


def test_env_info_is_json_and_names_the_essentials(tmp_path):
    info = env_info()
    write_json_atomic(tmp_path / "env.json", info)
    read = json.loads((tmp_path / "env.json").read_text())
    assert read["packages"]["jax"] and read["packages"]["numpy"] == np.__version__
    assert read["backend"] in read["devices"] or sum(read["devices"].values()) >= 1
    assert read["python"] and read["platform"] and read["command"]


def test_git_commit_only_of_the_checkout_that_tracks_the_folder(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True
        )

    assert git_commit(tmp_path) is None
    git("init")
    for folder in ("package", "site"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1\n")
    git("add", "package")
    git("commit", "-m", "one")
    commit = git_commit(tmp_path / "package")
    assert len(commit) == 40
    (tmp_path / "package" / "a.py").write_text("2\n")
    assert git_commit(tmp_path / "package") == f"{commit}+changes"
    assert git_commit(tmp_path / "site") is None


def test_write_json_atomic_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "deep" / "summary.json"
    write_json_atomic(path, {"loss": float("nan")})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"loss": object()})
    assert json.loads(path.read_text()) == {"loss": "nan"}
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    """Of a file that is open, Python does not say which it is."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/env\.json'"):
        write_json_atomic(tmp_path / "env.json", {})
    with records.MetricsWriter(tmp_path, "tune", 3) as writer, monkeypatch.context() as patch:
        patch.setattr(writer, "_file", SimpleNamespace(name="metrics.jsonl", write=full))
        with pytest.raises(OSError, match=r"No space left on device: 'metrics\.jsonl'"):
            writer.write(1, {})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_progress_line_names_the_module_of_router_losses():
    values = {"loss": 1.0, "encoder_balance": 1.25, "encoder_router_z": 0.5, "balance": 1.5}
    line = format_progress("sft", 3, 10, values, None)
    assert line == "sft  3/10  loss 1.0000  encoder balance 1.25  z 0.5  balance 1.5"


def test_the_progress_line_has_dropped_slots_as_a_share():
    """Lines cover different numbers of steps."""
    load = [[[30, 10], [0, 0]], [[20, 20], [0, 0]]]
    values = {"encoder_dropped": 20.0, "encoder_expert_load": load}
    assert format_progress("sft", 3, 10, values, None) == "sft  3/10  dropped 25.0%"
