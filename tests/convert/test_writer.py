"""The bytes of a chunk: any layout and dtype, piece by piece."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from unimoe_jax.checkpoint import new_sum
from unimoe_jax.convert import writer
from unimoe_jax.convert.writer import Leaf, write_chunk

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


def test_names_of_chunks():
    assert Leaf((2, 4, 5, 6), np.dtype(np.float32), 2).chunk_name((1, 3)) == "1.3.0.0"
    assert Leaf((), np.dtype(np.float32), 0).chunk_name(()) == "0"
