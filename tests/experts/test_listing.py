"""The manifest of a new checkpoint, and the list of its experts and their origins."""

from __future__ import annotations

import pytest

from tests.experts.stages import run, write_stage
from unimoe_jax.checkpoints.final import open_source
from unimoe_jax.checkpoints.manifest import read_manifest
from unimoe_jax.config import Take


def test_the_manifest_names_parents_and_hashes(upcycled, dense, capsys):
    manifest = read_manifest(upcycled)
    assert manifest["parents"] == {"base": str(dense)}
    assert set(manifest["hashes"]["base"]) == {"XXH3SUMS.json"}
    assert manifest["experts"]["encoder"] == ["base"] * 3
    assert manifest["command"].startswith("python -m unimoe_jax.experts upcycle --from")
    assert open_source("up", upcycled).moe_layers == (True, True, True)
    assert run("list", upcycled, "--compare") == 0
    printed = capsys.readouterr().out
    assert "decoder     3 of 3: 0–2" in printed
    assert "encoder expert 2  from base  largest difference from expert 0: 0" in printed


@pytest.mark.parametrize(
    ("take", "origins"),
    [
        ({"upcycle": "pft"}, ["pft"] * 4),
        ({"experts": ["pft", "pt", "a", "b"]}, ["pft", "pt", "a", "b"]),
        ({"source": "pft"}, [f"pft expert {number}" for number in range(4)]),
    ],
)
def test_the_list_names_the_origins_of_a_stages_experts(take, origins, tmp_path, settings, capsys):
    stage = next(stage for stage in settings.stages if stage.name == "sft")
    init = (Take(match="vision/.*/moe/experts/.*", **take), Take(match=".*", source="fresh"))
    run_settings = settings.model_copy(
        update={"stages": (stage.model_copy(update={"init": init}),)}
    )
    assert run("list", write_stage(tmp_path, run_settings, "sft", 4)) == 0
    printed = capsys.readouterr().out.splitlines()
    for expert, origin in enumerate(origins):
        assert f"encoder expert {expert}  from {origin}" in printed
        assert f"connector expert {expert}  from {origin}" in printed
