"""Damaged, truncated and hostile files are refused by name, and no code in them runs."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.convert.folders import llama_tensors, write_file, write_llama
from unimoe_jax.convert.reader import ConvertError, open_file, open_folder
from unimoe_jax.convert.torch_file import import_torch


def test_safetensors_reads_what_others_write_and_back(tmp_path: Path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float16),
    }
    write_file(tmp_path / "x.safetensors", tensors)
    theirs, ours = load_file(tmp_path / "x.safetensors"), open_file(tmp_path / "x.safetensors")
    assert set(theirs) == set(ours) == set(tensors)
    for name, value in tensors.items():
        assert ours[name].shape == value.shape
        assert ours[name].read().tobytes() == theirs[name].tobytes() == value.tobytes()


def test_released_pages_read_the_same(tmp_path: Path):
    tensors = {name: np.full((300, 300), i, np.float32) for i, name in enumerate("abc")}
    write_file(tmp_path / "x.safetensors", tensors)
    opened = open_file(tmp_path / "x.safetensors")
    view = opened["b"].read()
    opened["b"].release()
    assert (view == 1).all()
    assert (opened["c"].read() == 2).all()


def _safetensors(path: Path, header: object, data: bytes = b"\0" * 16, length=None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"x": GOOD}, b"\0" * 7, None, "truncated"),
        ({"x": GOOD}, b"\0" * 16, 1 << 60, "claims"),
        (b"{not json", b"", None, "not JSON"),
        ({"x": {**GOOD, "shape": [2, 3]}}, b"\0" * 16, None, r"needs 24 bytes"),
        ({"x": {**GOOD, "dtype": "F3"}}, b"\0" * 16, None, "malformed"),
        ({"x": {**GOOD, "shape": [-2, -2]}}, b"\0" * 16, None, "shape"),
        ({"x": {**GOOD, "shape": [1 << 30, 1 << 30]}}, b"\0" * 16, None, "needs"),
        ({"x": {**GOOD, "shape": [1 << 40, 1 << 40]}}, b"\0" * 16, None, "shape"),
        ({"x": {**GOOD, "shape": [10**400, 10**400]}}, b"\0" * 16, None, "shape"),
        ({"x": {**GOOD, "shape": [0, 1 << 62], "data_offsets": [0, 0]}}, b"", None, "shape"),
        ({"x": {**GOOD, "shape": [1] * 100 + [4]}}, b"\0" * 16, None, "shape"),
        ({"x": {**GOOD, "shape": [4.5]}}, b"\0" * 16, None, "malformed"),
        ({"x": {**GOOD, "shape": [math.inf]}}, b"\0" * 16, None, "malformed"),
        ({"x": {**GOOD, "data_offsets": [0, math.inf]}}, b"\0" * 16, None, "malformed"),
        ({"x": {**GOOD, "data_offsets": [math.inf, 16]}}, b"\0" * 16, None, "malformed"),
        ({"x": GOOD, "y": GOOD}, b"\0" * 16, None, "from 16"),
        ({"x": {"dtype": "F32"}}, b"", None, "malformed"),
        ([1], b"", None, "not JSON"),
    ],
)
def test_bad_safetensors(tmp_path: Path, header, data, length, message):
    path = _safetensors(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(ConvertError, match=message) as caught:
        open_file(path)
    assert "bad.safetensors" in str(caught.value)


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.zeros(2), "evil": Evil(tmp_path / "canary")}, tmp_path / "evil.bin")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    for name in ("evil.bin", "raw.pt"):
        with pytest.raises(ConvertError, match=rf"{name}: refused"):
            open_file(tmp_path / name)
    assert not (tmp_path / "canary").exists()


def test_damaged_torch_files(tmp_path: Path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.arange(1000)}, tmp_path / "good.bin")
    content = (tmp_path / "good.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(content[: len(content) // 2])
    with zipfile.ZipFile(tmp_path / "zip.bin", "w") as archive:
        archive.writestr("hello", "world")
    torch.save({"x": "text"}, tmp_path / "text.bin")
    torch.save(torch.zeros(3), tmp_path / "bare.bin")
    for name in ("short.bin", "zip.bin", "text.bin", "bare.bin"):
        with pytest.raises(ConvertError, match=name):
            open_file(tmp_path / name)
    np.testing.assert_array_equal(open_file(tmp_path / "good.bin")["x"].read(), np.arange(1000))


def test_without_torch_the_extra_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ConvertError, match=r"unimoe_jax\[convert\]"):
        open_file(tmp_path / "x.bin")


def test_an_old_torch_is_refused(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ConvertError, match=r"torch 2\.9\.1"):
        import_torch()


def test_an_index_must_agree_with_its_shards(tmp_path: Path):
    folder = write_llama(tmp_path / "m", llama_tensors())
    index = folder / "model.safetensors.index.json"
    mapped = dict.fromkeys(llama_tensors(), "model.safetensors")
    index.write_text(json.dumps({"weight_map": mapped}))
    assert len(open_folder(folder)) == len(mapped)
    index.write_text(json.dumps({"weight_map": mapped | {"ghost": "model.safetensors"}}))
    with pytest.raises(ConvertError, match="'ghost' is in the index but in no shard"):
        open_folder(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(ConvertError, match="outside"):
        open_folder(folder)
    index.write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    with pytest.raises(ConvertError, match=r"absent\.safetensors"):
        open_folder(folder)
