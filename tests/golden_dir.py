"""Find recorded reference data, and read arrays of which only some rows were recorded.

`NAME@STEP` holds every STEP-th row of the array NAME. Rows are the axis before the last.
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

    `$GOLDEN_DIR` is searched for the folder `name` (if the variable is not set, `../shared/golden`
    beside the repository), and then `tests/parity/fixtures`. The test fails if neither has it.
    """
    variable = os.environ.get("GOLDEN_DIR")
    folders = [Path(variable)] if variable else [ROOT.parent / "shared" / "golden"]
    folders.append(FIXTURES)
    for folder in folders:
        if (folder / name).is_dir() and any((folder / name).iterdir()):
            return folder / name
    tried = ", ".join(str(folder / name) for folder in folders)
    pytest.fail(f"there is no recorded reference data in {tried}; set GOLDEN_DIR to its folder")


def recorded_systems(folder: Path | None = None) -> list[Path]:
    """Folders of recorded Uni-MoE systems in the golden directory; the test fails without any.

    A system may be recorded whole or in part.
    """
    # Only the checkpoints of Uni-MoE have adapters.
    adapters = (folder or golden_dir()).glob("*/checkpoint/*/adapter_config.json")
    systems = sorted({path.parents[2] for path in adapters})
    if not systems:
        pytest.fail(f"there is no recorded Uni-MoE system in {folder or golden_dir()}")
    return systems


def recorded_cumo() -> list[Path]:
    """Folders of recorded CuMo systems in the golden directory; the test fails without any.

    A system may be recorded whole or in part.
    """
    configs = golden_dir().glob("*/checkpoint/*/config.json")
    systems = sorted({path.parents[2] for path in configs if '"clip_smoe"' in path.read_text()})
    if not systems:
        pytest.fail(f"there is no recorded CuMo system in {golden_dir()}")
    return systems


def split_key(key: str) -> tuple[str, int]:
    """Split `NAME@STEP` into (NAME, STEP); a key without a step is a whole array and has step 1."""
    name, _, step = key.partition("@")
    return name, int(step or 1)


def thin(value: np.ndarray, step: int) -> np.ndarray:
    """Every `step`-th row of [..., rows, columns]."""
    return value if step == 1 else value[..., ::step, :]


def as_recorded(values: Mapping[str, np.ndarray], keys: Iterable[str]) -> dict[str, np.ndarray]:
    """Cut `values` as they were recorded: {recorded key: its part of the value}.

    Keys whose name is not in `values` are left out.
    """
    named = {key: split_key(key) for key in keys}
    return {k: thin(values[name], step) for k, (name, step) in named.items() if name in values}
