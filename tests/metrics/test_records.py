"""The records of a run: metrics.jsonl and TensorBoard."""

import builtins
import errno
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.metrics import records
from unimoe_jax.metrics.records import MetricsWriter


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


def test_values_without_json_and_reserved_names_are_errors(tmp_path):
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
        file.write('{"stage": "tune", "st')  # as after a crash in the middle of a line
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


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", "align", 5, tensorboard=True, enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


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


def test_the_error_without_tensorboardx_says_how_to_install_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "tensorboardX":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install tensorboardX.*tensorboard=false"):
        MetricsWriter(tmp_path, "align", 5, tensorboard=True)
    MetricsWriter(tmp_path, "align", 5).close()  # without TensorBoard it is not needed


def test_an_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    """Python's errors while an open file is written do not name it."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with MetricsWriter(tmp_path, "tune", 3) as writer, monkeypatch.context() as patch:
        patch.setattr(writer, "_file", SimpleNamespace(name="metrics.jsonl", write=full))
        with pytest.raises(OSError, match=r"No space left on device: 'metrics\.jsonl'"):
            writer.write(1, {})
