"""CuMo: the names and shapes of the released folders, and import and export of every stage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.convert.cumo_folders import (
    EIGHT_SEVEN,
    SEVEN,
    TINY,
    Shapes,
    Sizes,
    config_json,
    connector_shapes,
    decoder_shapes,
    encoder_shapes,
    whole_shapes,
    write_stage,
)
from tests.convert.folders import write_file
from tests.convert.reading import read_all
from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.convert.__main__ import main
from unimoe_jax.convert.family_plans import plan_of
from unimoe_jax.convert.plan import Resolution, resolve_plan
from unimoe_jax.convert.reader import ConvertError, Tensor, open_file, open_folder
from unimoe_jax.convert.recognise import SourceFolder, recognise

HERE = Path("nowhere/model.safetensors")


def headers(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors of these shapes that cannot be read."""

    def read():
        raise AssertionError("only names and shapes are looked at")

    return {name: Tensor(name, HERE, shape, "bfloat16", read) for name, shape in shapes.items()}


def resolved(size: Sizes, groups: dict[str, Shapes], moe: bool) -> Resolution:
    source = SourceFolder(
        "cumo",
        HERE.parent,
        config_json(size, moe),
        {group: headers(shapes) for group, shapes in groups.items()},
    )
    return resolve_plan(plan_of([source]))


def numbers(resolution: Resolution) -> int:
    return sum(int(np.prod(t.shape, dtype=np.int64)) for t in resolution.targets.values())


def filled(resolution: Resolution) -> int:
    return sum(len(target.fills) for target in resolution.targets.values())


@pytest.mark.parametrize(
    "size, count, total", [(SEVEN, 1009, 8_250_388_480), (EIGHT_SEVEN, 1713, 47_711_449_088)]
)
def test_released_folders(size: Sizes, count: int, total: int):
    """Every tensor of a released folder is used, and every parameter is filled."""
    shapes = whole_shapes(size)
    resolution = resolved(size, {"base": shapes}, moe=True)
    assert len(shapes) == filled(resolution) == count
    assert numbers(resolution) == total
    assert not resolution.excused
    assert not resolution.overridden
    model = resolution.plan.model
    assert model.vision.scales == (1, 3)
    assert model.vision.num_tokens == 576
    assert model.vision.encoder.unread_layers == "keep"
    assert {name: moe.num_experts for name, moe in model.experts().items()} == (
        {"encoder": 4, "connector": 4} | ({"decoder": 8} if size.mixtral else {})
    )
    assert model.decoder.max_positions == 32768
    assert model.decoder.rope_theta == 1e6


def test_released_folder_of_the_second_stage():
    """The second stage saves dense parts in three files, 684 tensors in all."""
    groups = {
        "base": decoder_shapes(SEVEN),
        "clip": encoder_shapes(SEVEN, False),
        "projector": connector_shapes(SEVEN, False),
    }
    resolution = resolved(SEVEN, groups, moe=False)
    assert filled(resolution) == sum(map(len, groups.values())) == 684
    assert numbers(resolution) == 7_570_411_520
    assert not resolution.plan.model.experts()


def test_shards_that_hold_the_dense_parts_too():
    """Tensors in files beside the shards override the same tensors in the shards."""
    encoder = encoder_shapes(TINY, False)
    whole = decoder_shapes(TINY) | connector_shapes(TINY, False)
    whole |= {f"model.vision_tower.{name}": shape for name, shape in encoder.items()}
    source = SourceFolder("cumo", HERE.parent, config_json(TINY, False), {"base": headers(whole)})
    tower = SourceFolder("clip", HERE.parent, clip_json(), {"clip": headers(encoder)})
    resolution = resolve_plan(plan_of([source, tower]))
    assert len(resolution.overridden) == len(encoder)
    assert set(resolution.overridden) == {f"base:model.vision_tower.{name}" for name in encoder}


def clip_json() -> dict:
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=3)
    return dict(sizes, num_attention_heads=2, image_size=8, patch_size=4)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t | {"model.vision_tower.vision_model.x": (3,)}, ["vision_model.x"]),
        (lambda t: t | {"model.mm_projector.experts.4.0.weight": (8, 16)}, ["mm_projector"]),
        (
            lambda t: {k: v for k, v in t.items() if not k.endswith("layers.2.gate.weight")},
            ["unread_layers/moe/router/linear/kernel", "layers.2.gate.weight"],
        ),
        (
            lambda t: t | {"model.mm_projector.gate.weight": (5, 16)},
            ["model.mm_projector.gate.weight", "(5, 16)", "(4, 16)"],
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_named(change, words: list[str]):
    config = config_json(TINY, True)
    source = SourceFolder(
        "cumo", HERE.parent, config, {"base": headers(change(whole_shapes(TINY)))}
    )
    tower = SourceFolder("clip", HERE.parent, clip_json(), {"clip": {}})
    with pytest.raises(ConvertError) as error:
        resolve_plan(plan_of([source, tower]))
    for word in words:
        assert word in str(error.value)


def test_an_unknown_encoder_is_refused():
    """config.json of an unknown encoder must be given, because nothing is downloaded."""
    with pytest.raises(ConvertError, match=r"'tower' is neither a folder nor one of .*--from"):
        resolved(TINY, {"base": whole_shapes(TINY)}, moe=True)


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("stage", ["pt", "pft", "sft"])
@pytest.mark.parametrize("experts", [0, 3])
def test_there_and_back_is_bit_identical(stage: str, experts: int, tmp_path: Path, capsys):
    if stage != "sft":
        pytest.importorskip("torch")  # clip.bin and mm_projector.bin are torch files
    source = write_stage(tmp_path / "in" / "source", stage, Sizes(mixtral=experts))
    assert run("import", "--from", source, "--to", tmp_path / "a") == 0
    assert "0 excused" in capsys.readouterr().out
    out = tmp_path / "out"
    assert run("export", "--from", tmp_path / "a", "--to", out, "--format", "cumo") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("out/") and ".partial" not in printed
    assert {path.name for path in out.glob("*.bin")} == {
        "pt": {"mm_projector.bin"},
        "pft": {"clip.bin", "mm_projector.bin"},
        "sft": set(),
    }[stage]
    for file in source.glob("*.safetensors"):
        is_whole = file.name == "model.safetensors"
        there = open_folder(out) if is_whole else open_file(out / f"{file.stem}.bin")
        expected = open_file(file)
        assert set(there) == set(expected)
        for name, tensor in expected.items():
            assert there[name].read().tobytes() == tensor.read().tobytes(), name
    assert run("import", "--from", out, "--to", tmp_path / "b") == 0
    first, second = load_final(tmp_path / "a"), load_final(tmp_path / "b")
    assert set(first) == set(second)
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], err_msg=path)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_stages_are_completed_by_other_folders(tmp_path: Path, prefix: str):
    """A connector is completed by the encoder and the decoder with which it was trained."""
    connector = write_stage(tmp_path / "pt" / "source", "pt")
    other = write_stage(tmp_path / "pft" / "source", "pft")
    (alone,) = recognise([connector])
    assert set(alone.groups) == {"projector"}
    assert all(
        path.startswith("vision/connector/") for path in resolve_plan(plan_of([alone])).targets
    )
    decoder = tmp_path / "decoder"
    decoder.mkdir()
    config = config_json(TINY, False) | {"model_type": "mistral"}
    del config["mm_vision_tower"]
    (decoder / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").rename(decoder / "model.safetensors")
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (tmp_path / "pt" / "tower" / "config.json").rename(encoder / "config.json")
    found = open_file(other / "clip.safetensors")
    renamed = {prefix + n.removeprefix("vision_model."): t.read() for n, t in found.items()}
    write_file(encoder / "model.safetensors", renamed)
    (other / "clip.safetensors").unlink()
    params = read_all(resolve_plan(plan_of(recognise([connector, decoder, encoder]))))
    assert {path.split("/")[0] for path in params} == {"vision", "embed", "decoder", "lm_head"}
    assert params["vision/encoder/unread_layers/mlp/fc1/kernel"].shape == (1, 8, 12)
