"""Find recorded reference data, and read arrays of which only some rows are stored.

The key `NAME@STEP` holds every STEP-th row of the recorded array NAME; rows are the axis before the
last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "parity" / "fixtures"


def golden_dir(name: str = "") -> Path:
    """Folder of recorded reference data, e.g. `golden_dir("preprocessing")`.

    The folder is in `$GOLDEN_DIR`, or in `../shared/golden` beside the repository if the variable
    is not set; if it is not there, it is in `tests/parity/fixtures`. The test fails if none of them
    has `name`.
    """
    given = os.environ.get("GOLDEN_DIR")
    folders = [Path(given)] if given else [ROOT.parent / "shared" / "golden"]
    folders.append(FIXTURES)
    for folder in folders:
        if (folder / name).is_dir() and any((folder / name).iterdir()):
            return folder / name
    tried = ", ".join(str(folder / name) for folder in folders)
    pytest.fail(f"no recorded reference data: tried {tried}; set GOLDEN_DIR")


def recorded_systems(folder: Path | None = None) -> list[Path]:
    """Folders of recorded Uni-MoE systems, or of parts of them, in the golden directory in use."""
    adapters = (folder or golden_dir()).glob("*/checkpoint/*/adapter_config.json")
    found = sorted({path.parents[2] for path in adapters})
    if not found:
        pytest.fail(f"no recorded Uni-MoE system in {folder or golden_dir()}")
    return found


def recorded_cumo() -> list[Path]:
    """Folders of recorded CuMo systems, or of parts of them, in the golden directory in use. The
    test fails if there is none."""
    configs = golden_dir().glob("*/checkpoint/*/config.json")
    found = sorted({path.parents[2] for path in configs if '"clip_smoe"' in path.read_text()})
    if not found:
        pytest.fail(f"no recorded CuMo system in {golden_dir()}")
    return found


def split_key(key: str) -> tuple[str, int]:
    """Split `NAME@STEP` into (NAME, STEP); the key of a whole array has no STEP, which means 1."""
    name, _, step = key.partition("@")
    return name, int(step or 1)


def thin(value: np.ndarray, step: int) -> np.ndarray:
    """Every `step`-th row of [..., rows, columns]."""
    return value if step == 1 else value[..., ::step, :]


def as_recorded(values: Mapping[str, np.ndarray], keys: Iterable[str]) -> dict[str, np.ndarray]:
    """Recorded key -> the rows of `values` that it holds, for keys whose NAME is in `values`."""
    named = {key: split_key(key) for key in keys}
    return {k: thin(values[name], step) for k, (name, step) in named.items() if name in values}
