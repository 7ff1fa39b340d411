"""The recorded arrays, read once."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.features.recorded import RECORDED
from tests.golden_dir import golden_dir


@pytest.fixture(scope="session")
def golden():
    with np.load(golden_dir("preprocessing") / RECORDED) as file:
        return dict(file)
