"""Chunks of a waveform, and the filtering that Whisper's and BEATs' features share."""

from __future__ import annotations

import numpy as np

WINDOW, HOP = 400, 160
"""Samples of an analysis window (25 ms at 16 kHz) and between two windows (10 ms)."""
BLAS_ROWS = 8
"""Rows of a matrix product that BLAS computes without further threads."""


def chunk_starts(samples: int, size: int, stride: str) -> list[int]:
    """Return the first sample of each chunk of at most `size` samples.

    stride "exact": chunks follow one another. "reference": a chunk that is followed by another
    skips one sample after itself, as Uni-MoE's speech loader does.

    Example: 23 samples in chunks of 10 begin at 0, 10, 20 ("exact") or 0, 11, 22 ("reference").
    """
    step = size + (stride == "reference")
    return list(range(0, samples, step)) if samples > size else [0]


def split_chunks(wave: np.ndarray, size: int, stride: str, max_chunks: int) -> list[np.ndarray]:
    """Cut a waveform [samples] into at most `max_chunks` chunks of at most `size` samples."""
    starts = chunk_starts(len(wave), size, stride)[:max_chunks]
    return [wave[start : start + size] for start in starts]


def apply_filters(power: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """power [frames, n] @ filters [n, bins] in blocks so small that BLAS stays on this thread.

    Loader threads run in parallel already, and BLAS threads in addition would only slow them down.
    """
    # Whole blocks are one batched product; the remaining frames are fewer than BLAS_ROWS.
    in_blocks = len(power) // BLAS_ROWS * BLAS_ROWS
    blocks = power[:in_blocks].reshape(-1, BLAS_ROWS, power.shape[1])
    filtered = np.matmul(blocks, filters).reshape(in_blocks, filters.shape[1])
    return np.concatenate([filtered, power[in_blocks:] @ filters])
