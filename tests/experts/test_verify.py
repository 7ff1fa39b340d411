"""`convert verify` on checkpoints of stages and on experts: with logits where there are any."""

from __future__ import annotations

import shutil

from tests.experts.stages import convert, run
from unimoe_jax.checkpoints.final import load_final, save_final
from unimoe_jax.checkpoints.manifest import read_manifest


def test_parts_are_compared_without_logits(upcycled, tmp_path, capsys):
    """Experts that were split off have the settings of a whole model, but not its parameters."""
    cut = tmp_path / "cut"
    assert run("split", "--from", upcycled, "--to", cut, "--experts", "0,1") == 0
    capsys.readouterr()
    assert convert("verify", cut / "expert_0", cut / "expert_1") == 0
    assert "logits: not compared" in capsys.readouterr().out


def test_stages_are_compared_with_logits(dense, other, tmp_path, capsys):
    """The settings come from the run directory. A part of the model has no logits."""
    assert convert("verify", dense.parents[2], other) == 1
    assert "logits: largest difference" in capsys.readouterr().out
    params = {path: value for path, value in load_final(dense).items() if "mlp" not in path}
    manifest = {"stage": "pft", "moe_layers": read_manifest(dense)["moe_layers"]}
    part = tmp_path / "checkpoints" / "pft" / "final"
    shapes = {path: list(value.shape) for path, value in params.items()}
    save_final(part, params, manifest | {"shapes": shapes})
    shutil.copyfile(dense.parents[2] / "config.yaml", tmp_path / "config.yaml")
    assert convert("verify", part, dense) == 1
    assert "logits: not compared" in capsys.readouterr().out
