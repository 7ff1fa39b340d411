"""Where the chunks of a waveform begin."""

from __future__ import annotations

import pytest

from unimoe_jax.data.features.sound import chunk_starts


@pytest.mark.parametrize(
    ("samples", "stride", "starts"),
    [
        (10, "exact", [0]),
        (11, "exact", [0, 10]),
        (20, "exact", [0, 10]),
        (21, "exact", [0, 10, 20]),
        (11, "reference", [0]),
        (12, "reference", [0, 11]),
        (21, "reference", [0, 11]),
        (23, "reference", [0, 11, 22]),
    ],
)
def test_chunk_rules(samples, stride, starts):
    assert chunk_starts(samples, 10, stride) == starts
