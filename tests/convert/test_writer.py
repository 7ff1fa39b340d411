"""The bytes of a chunk for any layout and dtype, and the files in which it is stored."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from unimoe_jax.checkpoints.checksums import new_sum
from unimoe_jax.checkpoints.final import open_source
from unimoe_jax.convert import writer
from unimoe_jax.convert.writer import Chunk, Leaf, write_checkpoint, write_chunk

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((150, 70)).astype(np.float32)
VALUES = {
    "rows": MATRIX,
    "transposed": MATRIX.T,
    "strided": MATRIX[::2, ::-1],
    "three axes": RNG.standard_normal((5, 6, 7)).transpose(2, 0, 1),
    "vector": MATRIX[:, 3],
    "scalar": np.float32(2).reshape(()),
    "empty": np.zeros((0, 3), np.float32),
    "bfloat16": MATRIX.astype(ml_dtypes.bfloat16).T,
    "integers": np.arange(6).reshape(2, 3).T,
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("dtype", ["same", "float32", "bfloat16"])
@pytest.mark.parametrize("block", [1, 999, 1 << 20])
def test_a_chunk_is_the_value_in_c_order(tmp_path: Path, monkeypatch, name, dtype, block):
    monkeypatch.setattr(writer, "BLOCK_BYTES", block)
    value = VALUES[name]
    target = value.dtype if dtype == "same" else np.dtype(getattr(ml_dtypes, dtype, dtype))
    digest = write_chunk(tmp_path / "chunk", value, target)
    content = (tmp_path / "chunk").read_bytes()
    assert content == np.ascontiguousarray(value).astype(target).tobytes()
    assert digest == new_sum(content).hexdigest()


def test_files_of_chunks(monkeypatch):
    leaf = Leaf((2, 4, 5, 6), np.dtype(np.float32), 2)
    assert list(leaf.files((1, 3))) == [("1.3.0.0", (slice(0, 5), slice(0, 6)))]
    assert list(Leaf((), np.dtype(np.float32), 0).files(())) == [("0", ())]
    assert [name for name, _ in Leaf((0, 3), np.dtype(np.float32), 0).files(())] == ["0.0"]
    monkeypatch.setattr(writer, "PIECE_BYTES", 48)  # twelve numbers
    assert list(leaf.files((0, 2))) == [  # 5 is odd and cannot be halved
        ("0.2.0.0", (slice(0, 5), slice(0, 3))),
        ("0.2.0.1", (slice(0, 5), slice(3, 6))),
    ]
    assert Leaf((7, 8, 12), np.dtype(np.float16), 1).piece == (4, 6)


def test_a_part_of_a_matrix_is_read_from_its_files_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(writer, "PIECE_BYTES", 100)
    value = RNG.standard_normal((2, 8, 12)).astype(np.float32)
    leaf = Leaf(value.shape, value.dtype, 1)
    work = [Chunk("a/b", (n,), lambda n=n: value[n], lambda: None) for n in range(2)]
    manifest = {"shapes": {"a/b": list(value.shape)}, "moe_layers": []}
    folder = tmp_path / "out"
    write_checkpoint(folder, {"a/b": leaf}, work, lambda folder: manifest)
    source = open_source("out", folder)
    source.check()
    np.testing.assert_array_equal(source.load("a/b", ()), value)
    assert leaf.piece == (4, 6)
    for file in (folder / "params/a/b").glob("1.*"):
        if file.name != "1.1.0":
            file.unlink()  # zarr reads a missing file as zeros
    found = source.load("a/b", (1, slice(4, 8)))
    np.testing.assert_array_equal(found[:, :6], value[1, 4:, :6])
    assert not found[:, 6:].any()
