"""Files are written completely or not at all, and errors name them."""

import errno
import json
from pathlib import Path

import pytest

from unimoe_jax.runtime import files
from unimoe_jax.runtime.files import WriteError, raising_write_errors, write_json_atomic


def test_write_json_atomic_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "deep" / "summary.json"
    write_json_atomic(path, {"loss": float("nan")})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"loss": object()})
    assert json.loads(path.read_text()) == {"loss": "nan"}
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    """Python's errors while an open file is written do not name it."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/env\.json'"):
        write_json_atomic(tmp_path / "env.json", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left"),
            r"^run: cannot be written \(No space left\); free",
        ),
        (PermissionError(errno.EACCES, "Denied", "x"), r"^run: cannot be written \(Denied: x\)"),
        # TensorStore raises a ValueError.
        (
            ValueError("INTERNAL: Disk is full [OS error 28: ENOSPC]"),
            r"\(Disk is full\); free space",
        ),
    ],
)
def test_write_errors_say_where_and_why(error, message):
    with (
        pytest.raises(WriteError, match=message),
        raising_write_errors(Path("run"), "; free space"),
    ):
        raise error


def test_other_errors_pass_through():
    with pytest.raises(ValueError, match="wrong"), raising_write_errors(Path("run")):
        raise ValueError("wrong")
