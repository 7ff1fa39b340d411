"""Where recorded reference data lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def golden_dir(name: str = "") -> Path:
    """Folder of recorded reference data, e.g. `golden_dir("preprocessing")`.

    `$GOLDEN_DIR`, else `../shared/golden` beside the repository, else `tests/parity/fixtures`.
    Fails the test when none of them has `name`.
    """
    given = os.environ.get("GOLDEN_DIR")
    folders = [Path(given)] if given else [ROOT.parent / "shared" / "golden"]
    folders.append(ROOT / "tests" / "parity" / "fixtures")
    for folder in folders:
        if (folder / name).is_dir() and any((folder / name).iterdir()):
            return folder / name
    tried = ", ".join(str(folder / name) for folder in folders)
    pytest.fail(f"no recorded reference data: tried {tried}; set GOLDEN_DIR")
