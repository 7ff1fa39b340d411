"""Compare trees of arrays by the relative norm of their differences."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def relative_error(actual: Any, expected: Any, floor: float = 0.0) -> float:
    """‖actual − expected‖ / max(‖expected‖, floor) in float64; ‖actual‖ if the divisor is 0."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    norm = max(float(np.linalg.norm(expected)), floor)
    return float(np.linalg.norm(actual - expected)) / (norm if norm > 0 else 1.0)


def assert_close(actual: Any, expected: Any, tolerance: float, floor: float = 0.0) -> None:
    """Assert that the relative error of every leaf is at most `tolerance`.

    The message names the leaves whose error is larger.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    errors = jax.tree.map(lambda a, e: relative_error(a, e, floor), actual, expected)
    bad = {
        jax.tree_util.keystr(path): error
        for path, error in jax.tree_util.tree_leaves_with_path(errors)
        if not error <= tolerance  # NaN is bad as well
    }
    assert not bad, f"relative errors above {tolerance}: {bad}"
