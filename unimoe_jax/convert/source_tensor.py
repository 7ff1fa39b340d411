"""One tensor of a source checkpoint, and the error for checkpoints that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np


class ConvertError(RuntimeError):
    """A checkpoint cannot be read or does not fit. The message names file, tensor and shapes."""


def _nothing() -> None:
    """The `release` of tensors whose pages need not be given back."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a source file.

    Attributes:
        shape, dtype: as stored in the file; `dtype` is a name of numpy or `bfloat16`.
        read: returns a read-only view of the mapped file.
        release: gives the view's pages back to the system, so that tensors that have been converted
            do not count as memory of this process. The view stays valid, because pages that are
            read again come from the file.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray] = field(repr=False, compare=False)
    release: Callable[[], None] = field(default=_nothing, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np_dtype(self.dtype).itemsize


Tensors = dict[str, Tensor]


def np_dtype(name: str) -> np.dtype:
    """The numpy dtype of a name, which may also be `bfloat16`."""
    return np.dtype(getattr(ml_dtypes, name, name))
