"""What an evaluation is compared with."""

from __future__ import annotations

import json

from tests.data.helpers import data_config, talk
from unimoe_jax.setup_data import chance_levels


def test_chance_is_read_as_the_loader_reads(tmp_path):
    """A byte-order mark and records that are counted as bad spoil nothing."""
    odd = [
        {"conversations": [{"from": "human"}, {"from": "gpt"}]},
        {"conversations": "abc"},
        {"conversations": [1, 2]},
        {},
    ]
    good = [talk("a?", "x"), talk("b?", "x"), talk("c?", "y"), talk("d?", "x")]
    lines = [json.dumps(content) for content in (*good, *odd)]
    file = tmp_path / "data.jsonl"
    file.write_text("\ufeff" + "\n".join([*lines, '{"broken', "[1]"]))
    assert chance_levels(data_config(file), ["all"]) == {"all": 0.75}
    file.write_text(json.dumps(odd))
    assert chance_levels(data_config(file), ["all"]) == {"all": 0}
