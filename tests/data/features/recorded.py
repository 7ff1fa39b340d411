"""The recorded outputs of the original front ends (see the README beside the recorded files)."""

from __future__ import annotations

import numpy as np

from tests.golden_dir import golden_dir, split_key

RECORDED = "expected_uni.npz"
"""The file of expected arrays in the golden folder `preprocessing`."""


def recorded_names(end: str) -> list[str]:
    """Names of the media for which a key with this end was recorded."""
    with np.load(golden_dir("preprocessing") / RECORDED) as file:
        return sorted({key.split("/")[0] for key in file if split_key(key)[0].endswith(end)})


def media(name: str) -> str:
    """The path of a media file."""
    (path,) = (golden_dir("preprocessing") / "media").glob(f"{name}.*")
    return str(path)


def find(golden, name: str) -> tuple[np.ndarray | None, int]:
    """(the array recorded as `name`, or None; n if only every n-th row of it was recorded)."""
    matches = [
        (value, split_key(key)[1]) for key, value in golden.items() if split_key(key)[0] == name
    ]
    assert len(matches) <= 1, name
    return matches[0] if matches else (None, 1)
