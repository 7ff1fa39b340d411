"""Waveform chunks and the filtering that Whisper and BEATs features share."""

from __future__ import annotations

import numpy as np

WINDOW, HOP = 400, 160
BLAS_ROWS = 8


def chunk_starts(samples: int, size: int, stride: str) -> list[int]:
    """Where the chunks of at most `size` samples begin.

    stride "reference": a chunk that is followed by another skips one sample after itself, as
    Uni-MoE's speech loader does.
    """
    step = size + (stride == "reference")
    return list(range(0, samples, step)) if samples > size else [0]


def split_chunks(wave: np.ndarray, size: int, stride: str, most: int) -> list[np.ndarray]:
    """[samples] -> at most `most` chunks of at most `size` samples."""
    return [wave[start : start + size] for start in chunk_starts(len(wave), size, stride)[:most]]


def apply_filters(power: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """power @ filters in blocks so small that BLAS stays on this thread.

    Loader threads run side by side; BLAS threads on top of them only get in each other's way.
    """
    whole = len(power) // BLAS_ROWS * BLAS_ROWS
    blocks = power[:whole].reshape(-1, BLAS_ROWS, power.shape[1])
    head = np.matmul(blocks, filters).reshape(whole, filters.shape[1])
    return np.concatenate([head, power[whole:] @ filters])
