"""Import a CLIP encoder alone, with and without the layers after its output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.convert.cumo_folders import TINY, encoder_shapes, tensors, tower_json
from tests.convert.folders import write_file
from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.convert.__main__ import main


@pytest.mark.parametrize("unread", ["drop", "keep"])
def test_layers_after_the_selected_one(tmp_path: Path, unread: str):
    """CuMo's first stage starts from an import with `keep`."""
    folder, out = tmp_path / "clip", tmp_path / "out"
    folder.mkdir()
    write_file(folder / "model.safetensors", tensors(encoder_shapes(TINY, moe=False)))
    (folder / "config.json").write_text(json.dumps(tower_json(TINY)))
    arguments = ("import", "--from", str(folder), "--to", str(out), "--unread-layers", unread)
    assert main(arguments) == 0
    params = load_final(out)
    layers = params["vision/encoder/layers/mlp/fc1/kernel"]
    kept = params.get("vision/encoder/unread_layers/mlp/fc1/kernel")
    count = json.loads((folder / "config.json").read_text())
    count = count.get("vision_config", count)["num_hidden_layers"]
    assert len(layers) == count - 1
    assert (kept is None) == (unread == "drop")
    if unread == "keep":
        assert kept.shape == (1, *layers.shape[1:])


@pytest.mark.parametrize("unread", ["drop", "keep"])
def test_an_unknown_tensor_in_a_built_layer_is_refused(tmp_path: Path, capsys, unread: str):
    """An unknown tensor is ignored only in layers that are not built; elsewhere it could change
    features."""
    folder, out = tmp_path / "clip", tmp_path / "out"
    folder.mkdir()
    shapes = encoder_shapes(TINY, moe=False)
    prefix = next(name for name in shapes if ".layers.0." in name).partition("0.")[0]
    strange = f"{prefix}{'2' if unread == 'keep' else '0'}.self_attn.q_norm.weight"
    write_file(folder / "model.safetensors", tensors(shapes | {strange: (4,)}))
    (folder / "config.json").write_text(json.dumps(tower_json(TINY)))
    arguments = ("import", "--from", str(folder), "--to", str(out), "--unread-layers", unread)
    assert main(arguments) == 2
    assert strange in capsys.readouterr().err
    assert not out.exists()
