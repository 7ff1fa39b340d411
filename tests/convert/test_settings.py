"""config.json and side files of a source are read as the originals read them, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig, MistralConfig, MixtralConfig

from tests.convert import unimoe_folders
from tests.convert.cumo_folders import TINY, config_json, write_stage
from tests.convert.folders import CONFIG, write_file
from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.config import BeatsConfig, ModelConfig
from unimoe_jax.convert.__main__ import main
from unimoe_jax.convert.family_plans import plan_of
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.plan import resolve_plan
from unimoe_jax.convert.reader import ConvertError, open_file
from unimoe_jax.convert.recognise import recognise
from unimoe_jax.convert.tables import beats, cumo, llama, mixtral
from unimoe_jax.data.features.clip import CLIP_MEAN
from unimoe_jax.experts.__main__ import main as experts


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def rewrite(path: Path, **changes: np.ndarray | None) -> None:
    """Change tensors of a file; None removes a tensor."""
    tensors = {name: tensor.read() for name, tensor in open_file(path).items()} | changes
    write_file(path, {k: np.array(v) for k, v in tensors.items() if v is not None})


def model_of(root: Path) -> ModelConfig:
    return plan_of(recognise([root])).model


# ---------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
def test_missing_settings_have_the_defaults_of_transformers(kind: str):
    theirs = {"llama": LlamaConfig, "mistral": MistralConfig, "mixtral": MixtralConfig}[kind]
    sizes = {key: value for key, value in CONFIG.items() if key not in OPTIONAL}
    sizes |= {"model_type": kind, "num_attention_heads": 8, "hidden_size": 64}
    expected = theirs(**sizes)
    if kind == "mixtral":
        config = mixtral.mixtral_config(sizes)
        assert config.moe.num_experts == expected.num_local_experts
        assert config.moe.top_k == expected.num_experts_per_tok
    else:
        config = llama.decoder_config(sizes, kind=kind)
    window = getattr(expected, "sliding_window", None)
    assert config.norm_eps == expected.rms_norm_eps
    assert config.num_kv_heads == expected.num_key_value_heads
    assert config.max_positions == min(window or 1 << 40, expected.max_position_embeddings)
    theta = expected.rope_parameters["rope_theta"]
    # Old releases, which wrote the published files, have another default for Mixtral only.
    assert config.rope_theta == (1e6 if kind == "mixtral" else theta)


OPTIONAL = ("architectures", "num_key_value_heads", "rms_norm_eps")


def test_cumos_decoder_follows_from_model_type():
    config = config_json(TINY, False) | {"model_type": "llava_mixtral"}
    assert cumo.decoder_config(config).moe.num_experts == 8
    del config["rms_norm_eps"], config["sliding_window"]
    assert cumo.decoder_config(config).norm_eps == 1e-5
    mistral = cumo.decoder_config(config | {"model_type": "llava_mistral"})
    assert mistral.moe is None
    assert (mistral.norm_eps, mistral.max_positions) == (1e-6, 4096)


# ---------------------------------------------------------------------------------- encoders


def test_clip_activations_are_read_or_refused(tmp_path: Path):
    unimoe_folders.write(tmp_path / "in", experts=4)
    assert model_of(tmp_path / "in").vision.encoder.activation == "quick_gelu"
    edit(tmp_path / "in/clip/config.json", hidden_act="gelu")
    assert model_of(tmp_path / "in").vision.encoder.activation == "gelu"
    assert run("import", "--from", tmp_path / "in/clip", "--to", tmp_path / "a") == 0
    assert run("export", "--from", tmp_path / "a", "--to", tmp_path / "b", "--format", "hf") == 0
    assert json.loads((tmp_path / "b/clip/config.json").read_text())["hidden_act"] == "gelu"
    edit(tmp_path / "in/clip/config.json", hidden_act="silu")
    with pytest.raises(ConvertError, match="hidden_act 'silu'"):
        model_of(tmp_path / "in")


@pytest.mark.parametrize(
    "file,change,message",
    [
        ("whisper/config", {"activation_function": "relu"}, "activation_function 'relu'"),
        ("tuned/config", {"mm_vision_select_feature": "cls_patch"}, "select_feature 'cls_patch'"),
        ("whisper/config", {"encoder_attention_heads": 3}, "hidden_size = 4 is not a multiple"),
        ("whisper/config", {"decoder_attention_heads": 3}, "hidden_size = 4 is not a multiple"),
        ("clip/config", {"num_attention_heads": 3}, "hidden_size = 4 is not a multiple"),
        ("clip/config", {"patch_size": 8}, "patch_size = 8 is larger than image_size = 4"),
        ("whisper/config", {"max_target_positions": 2}, "num_queries = 3 exceeds max_positions"),
        ("tuned/config", {"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ("tuned/config", {"mm_audio_select_layer": -2}, "mm_audio_select_layer -2"),
        ("tuned/config", {"mm_projector_type": "mlp2x_silu"}, "mm_projector_type is 'mlp2x_silu'"),
        (
            "tuned/config",
            {"audio_projector_type": "mlp1x_gelu"},
            "is 'mlp1x_gelu', but the tensors",
        ),
        ("tuned/adapter_config", {"use_rslora": True}, "adapter_config.json: use_rslora = True"),
        ("tuned/adapter_config", {"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ("tuned/adapter_config", {"peft_type": "VERA"}, "peft_type = 'VERA'"),
        ("tuned/adapter_config", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ("tuned/config", {"num_experts": 8}, "num_experts = 8, but the base has 4"),
    ],
)
def test_unknown_settings_that_change_numbers_are_refused(
    tmp_path: Path, file: str, change: dict, message: str
):
    unimoe_folders.write(tmp_path, experts=4)
    edit(tmp_path / f"{file}.json", **change)
    with pytest.raises(ConvertError, match=message):
        model_of(tmp_path)


@pytest.mark.parametrize(
    "role,change,message",
    [
        ("clip", {"image_mean": [0.5, 0.5, 0.5]}, r"image_mean \[0.5"),
        ("clip", {"size": {"shortest_edge": 6}}, "shortest_edge"),
        ("clip", {"do_center_crop": False}, "do_center_crop False"),
        ("whisper", {"hop_length": 80}, "hop_length 80 is not supported; it must be 160"),
    ],
)
def test_a_processor_of_another_kind_is_refused(
    tmp_path: Path, role: str, change: dict, message: str
):
    unimoe_folders.write(tmp_path, experts=4)
    sides = {"size": {"shortest_edge": 4}, "crop_size": {"height": 4, "width": 4}, "resample": 3}
    pixels = {"image_mean": CLIP_MEAN.tolist(), "image_std": [0.26862954, 0.26130258, 0.27577711]}
    steps = {"do_center_crop": True, "rescale_factor": 0.00392156862745098}
    known = {"clip": sides | pixels | steps, "whisper": {"feature_size": 4, "hop_length": 160}}
    file = tmp_path / role / "preprocessor_config.json"
    file.write_text(json.dumps(known[role]))
    assert model_of(tmp_path).vision.encoder.image_size == 4
    edit(file, **change)
    with pytest.raises(ConvertError, match=message):
        model_of(tmp_path)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ({"use_fm_block": True}, "use_fm_block = True, but fm_adapter is missing"),
    ],
)
def test_settings_that_deepspeed_computes_differently_are_refused(
    tmp_path: Path, change: dict, message: str
):
    unimoe_folders.write(tmp_path, experts=8)
    for folder in ("base", "tuned"):
        edit(tmp_path / folder / "config.json", **change)
    with pytest.raises(ConvertError, match=message):
        model_of(tmp_path)


def test_modality_maps_must_agree_with_the_config(tmp_path: Path):
    unimoe_folders.write(tmp_path, experts=8)
    write_file(tmp_path / "tuned/fm_adapter.safetensors", {})
    assert not model_of(tmp_path).decoder.moe.router.modality_map
    name = "model.layers.0.mlp.deepspeed_moe.fm_text.bias"
    write_file(tmp_path / "tuned/fm_adapter.safetensors", {name: np.zeros(8, np.float32)})
    assert model_of(tmp_path).decoder.moe.router.modality_map
    edit(tmp_path / "tuned/config.json", use_fm_block=False)
    with pytest.raises(ConvertError, match="use_fm_block = False, but fm_adapter has maps"):
        model_of(tmp_path)


@pytest.mark.parametrize(
    "key,value",
    [("deep_norm", None), ("gru_rel_pos", None), ("activation_fn", "relu"), ("conv_bias", True)],
)
def test_a_beats_of_another_kind_is_refused(key: str, value):
    """A switch that the file does not name is off in the original."""
    sizes = {"hidden_size": 4, "embed_size": 4, "mlp_dim": 6, "num_layers": 1, "num_heads": 1}
    cfg = beats.to_cfg(BeatsConfig(**sizes))
    assert beats.beats_config(cfg).hidden_size == 4
    changed = {k: v for k, v in (cfg | {key: value}).items() if v is not None}
    with pytest.raises(ConvertError, match=f"BEATs with {key}="):
        beats.beats_config(changed)


def test_a_qformer_of_another_activation_is_refused():
    with pytest.raises(ConvertError, match="hidden_act 'relu'"):
        beats.qformer_config({"hidden_act": "relu"}, 2, 1)


@pytest.mark.parametrize("name", ["/data/models/{}", "openai/{}", "{}"])
def test_the_encoder_beside_cumo_is_found_by_its_last_name(tmp_path: Path, name: str):
    """The config may name a path of another machine; a folder here precedes known encoders."""
    folder = write_stage(tmp_path / "source", "sft")
    last = Path(next(iter(cumo.KNOWN))).name
    (tmp_path / "tower").rename(tmp_path / last)
    edit(folder / "config.json", mm_vision_tower=name.format(last))
    assert model_of(folder).vision.encoder.image_size == TINY.image


@pytest.mark.parametrize(
    "stage,change",
    [
        ("sft", {"mm_use_im_start_end": True}),
        ("sft", {"mm_projector_type": "mlp2x_gelu"}),
        ("pft", {"mm_projector_type": "mlp2x_silu"}),
    ],
)
def test_cumo_refuses_what_changes_its_images(tmp_path: Path, stage: str, change: dict):
    folder = write_stage(tmp_path / "source", stage)
    edit(folder / "config.json", **change)
    with pytest.raises(ConvertError, match=next(iter(change))):
        plan_of(recognise([folder]))


def test_unimoe_cuts_images_whatever_the_config_says(tmp_path: Path):
    """Released base configs say "pad", but the originals do not read this setting."""
    unimoe_folders.write(tmp_path, experts=4)
    edit(tmp_path / "base/config.json", image_aspect_ratio="pad", architectures=None)
    edit(tmp_path / "tuned/config.json", image_aspect_ratio="pad")
    assert model_of(tmp_path).vision.aspect == "square"


# -------------------------------------------------------------------------------- lost weights


def test_a_base_may_keep_its_connectors_in_safetensors(tmp_path: Path):
    files = unimoe_folders.write(tmp_path / "in", experts=4)
    prefix = "base_model.model.model.mm_projector."
    moved = {
        name.removeprefix("base_model.model."): value + 1
        for name, value in files["tuned/non_lora_trainables"].items()
        if name.startswith(prefix)
    }
    write_file(tmp_path / "in/base/mm_projector.safetensors", moved)
    resolution = resolve_plan(plan_of(recognise([tmp_path / "in"])))
    assert set(resolution.overridden) >= {f"base_projector:{name}" for name in moved}


def test_adapters_of_an_adapter_config_must_exist(tmp_path: Path):
    unimoe_folders.write(tmp_path, experts=4)
    (tmp_path / "tuned/adapter_model.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"lacks \['adapter_model'\]"):
        plan_of(recognise([tmp_path]))


@pytest.mark.parametrize(
    "lora,message",
    [("merge", r"layers.2.self_attn.q_proj.lora_A"), ("keep", "q_proj/lora_a.*is not filled")],
)
def test_an_adapter_of_one_layer_may_not_be_missing(tmp_path: Path, lora: str, message: str):
    unimoe_folders.write(tmp_path, experts=4)
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_{}.weight"
    rewrite(
        tmp_path / "tuned/adapter_model.safetensors",
        **{name.format("A"): None, name.format("B"): None},
    )
    with pytest.raises(ConvertError, match=message):
        resolve_plan(plan_of(recognise([tmp_path]), Options(lora)))


def test_an_adapter_may_be_missing_if_target_modules_does_not_list_it(tmp_path: Path):
    """The originals list the full names of the adapted modules."""
    unimoe_folders.write(tmp_path, experts=4)
    file = tmp_path / "tuned/adapter_model.safetensors"
    module = "model.layers.2.self_attn.q_proj"
    rewrite(file, **{f"base_model.model.{module}.lora_{part}.weight": None for part in "AB"})
    prefix, end = "base_model.model.", ".lora_A.weight"
    made = [n.removeprefix(prefix).removesuffix(end) for n in open_file(file) if n.endswith(end)]
    edit(tmp_path / "tuned/adapter_config.json", target_modules=made)
    merged = {copy.src for copy in plan_of(recognise([tmp_path])).copies if copy.adapter}
    assert "base:model.layers.1.self_attn.q_proj.weight" in merged
    assert f"base:{module}.weight" not in merged
    for targets in ([*made, module], ["q_proj", "v_proj", "up_proj"]):
        edit(tmp_path / "tuned/adapter_config.json", target_modules=targets)
        with pytest.raises(ConvertError, match=r"layers.2.self_attn.q_proj.lora_A"):
            plan_of(recognise([tmp_path]))


def test_every_layer_of_experts_needs_its_trained_router(tmp_path: Path):
    unimoe_folders.write(tmp_path, experts=4)
    rewrite(tmp_path / "tuned/mlp_gates.safetensors", **{"model.layers.2.mlp.gate.weight": None})
    with pytest.raises(ConvertError, match=r"mlp_gates lacks the routers of layers \[2\]"):
        plan_of(recognise([tmp_path]))


# --------------------------------------------------------------------------------- exporting


@pytest.mark.parametrize("kind", ["mlp1x_gelu", "linear"])
def test_a_projector_of_one_layer_keeps_its_names(tmp_path: Path, kind: str):
    """The originals expect numbered layers for mlp1x_gelu and find no others."""
    unimoe_folders.write(tmp_path / "in", experts=4)
    name = "model.mm_audio_aligner.projector."
    if kind == "mlp1x_gelu":
        file = tmp_path / "in/tuned/mm_audio_aligner.safetensors"
        ends = ("weight", "bias")
        moved = {f"{name}0.{end}": open_file(file)[name + end].read() for end in ends}
        rewrite(file, **{name + end: None for end in ends}, **moved)
        edit(tmp_path / "in/tuned/config.json", audio_projector_type=kind)
    assert run("import", "--from", tmp_path / "in", "--to", tmp_path / "a") == 0
    out = tmp_path / "out"
    assert run("export", "--from", tmp_path / "a", "--to", out, "--format", "unimoe") == 0
    left, right = (
        {n for n in open_file(root / "tuned/mm_audio_aligner.safetensors") if n.startswith(name)}
        for root in (tmp_path / "in", out)
    )
    assert left == right
    assert json.loads((out / "tuned/config.json").read_text())["audio_projector_type"] == kind
    assert model_of(out).speech == model_of(tmp_path / "in").speech


def test_a_pruned_8e_model_survives_export_and_import(tmp_path: Path):
    """The adapters are merged, so no config.json states their rank."""
    unimoe_folders.write(tmp_path / "in", experts=8)
    assert run("import", "--from", tmp_path / "in", "--to", tmp_path / "a") == 0
    pruned = ["prune", "--from", tmp_path / "a", "--keep", "0,1,7", "--to", tmp_path / "b"]
    assert experts([str(argument) for argument in pruned]) == 0
    out = ("--to", tmp_path / "c", "--format", "unimoe")
    assert run("export", "--from", tmp_path / "b", *out) == 0
    assert run("import", "--from", tmp_path / "c", "--to", tmp_path / "d") == 0
    first, second = load_final(tmp_path / "b"), load_final(tmp_path / "d")
    assert set(first) == set(second)
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], err_msg=path)


def test_cumo_refuses_experts_that_one_key_cannot_count(tmp_path: Path, capsys):
    write_stage(tmp_path / "in", "sft")
    assert run("import", "--from", tmp_path / "in", "--to", tmp_path / "a") == 0
    pruned = ["prune", "--from", tmp_path / "a", "--module", "connector", "--keep", "0,1"]
    assert experts([str(argument) for argument in [*pruned, "--to", tmp_path / "b"]]) == 0
    out = tmp_path / "c"
    assert run("export", "--from", tmp_path / "b", "--to", out, "--format", "cumo") == 2
    assert "one num_experts and one num_selected" in capsys.readouterr().err
    assert not out.exists()
