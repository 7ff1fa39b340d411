"""The recordings of the repository are complete, whatever golden directory is in use.

The other tests run for the recordings that they find, so a lost file would go unnoticed there.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.golden_dir import FIXTURES, recorded_systems, split_key
from tests.parity.golden_checks import CUMO_TOLERANCES, TOLERANCES

LIMIT = 8_000_000  # bytes
SYSTEMS = {path.name: path for path in recorded_systems(FIXTURES)}
HEARING = ("audio_tower_features", "audio_aligner_decoder_out", "audio_aligner_out")
VISION = ("vision_tower_features", "mm_projector_out")
PIXELS = r".*/pixel_values/call\d+"  # enlarged images; their features show the same
CUMO = (
    *(rf"final/clip/layer\d+/{what}/call[01]" for what in ("router_logits", "selected_experts")),
    *(rf"final/clip/layer2/{loss}_loss/call1" for loss in ("balance", "z")),
    *(rf"final/mlp/{what}" for what in ("router_logits", "selected_experts", "balance_loss")),
    *(rf"final/aux_unscaled/{part}_{loss}_loss" for part in ("clip", "mlp") for loss in ("z",)),
    r"final/(vision_tower_features|connector_out)",
    r"final/clip/hidden/call1",
)
WHOLE = (
    *(rf"{form}/layer\d+/router_logits" for form in ("unmerged", "merged")),
    *(rf"{form}/layer\d+/selected_experts" for form in ("unmerged", "merged")),
    *(rf"(unmerged|noisy)/aux_{loss}_loss_scaled" for loss in ("balance", "multimodal", "kl")),
    r"(unmerged|merged|noisy)/logits\w*",
    r"noisy/layer\d+/(gumbel_noise|router_logits_returned)",
    r"unmerged/spliced/(inputs_embeds|labels)",
    r"grad_(stage3|all)/.*",
    r"generate/\d+/new_tokens",
)


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "expected.safetensors", "np") as file:
        return {split_key(key)[0] for key in file.keys()}  # noqa: SIM118


def parts_of(folder: Path) -> set[str]:
    return {name.split("/")[1] for name in names_in(folder)} & {*HEARING, *VISION}


def ears_of(folder: Path) -> str:
    """`beats` or `whisper`, whichever sound encoder the checkpoint has."""
    (config,) = (
        p.with_name("config.json") for p in folder.glob("checkpoint/*/adapter_config.json")
    )
    tower = folder / "checkpoint" / json.loads(config.read_text())["mm_audio_tower"]
    return (
        "beats"
        if tower.is_file()
        else json.loads((tower / "config.json").read_text())["model_type"]
    )


def test_every_file_is_listed_and_intact():
    lines = (FIXTURES / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {path.relative_to(FIXTURES).as_posix(): path for path in FIXTURES.glob("*/**/*")}
    found = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path.is_file()
    }
    assert found == listed
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) <= LIMIT


def test_both_encoders_of_sound_are_there():
    assert {ears_of(folder) for folder in SYSTEMS.values()} == {"whisper", "beats"}
    for name, folder in SYSTEMS.items():
        assert set(HEARING) <= parts_of(folder), name
    assert any(set(VISION) <= parts_of(folder) for folder in SYSTEMS.values())


def test_the_vision_side_of_cumo_is_there():
    """Router, experts and losses of every layer at both scales, with the last stage's names."""
    (folder,) = {path.parents[2] for path in FIXTURES.glob("*/checkpoint/CuMo-*/config.json")}
    names = names_in(folder)
    kinds = {pattern for pattern, *_ in CUMO_TOLERANCES} - {PIXELS}
    for pattern in (*CUMO, *sorted(kinds)):
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    (file,) = folder.glob("checkpoint/*/model.safetensors")
    with safe_open(file, "np") as tensors:
        assert any(".experts.3.fc2.bias" in name for name in tensors.keys())  # noqa: SIM118


def test_one_system_is_whole():
    whole = {gates.parents[2].name for gates in FIXTURES.glob("*/checkpoint/*/mlp_gates.bin")}
    assert whole == {"unimoe-8e"}
    names = names_in(SYSTEMS["unimoe-8e"])
    # Every kind of value with a tolerance. Margins were recorded for four-expert systems only.
    kinds = {pattern for pattern, *_ in TOLERANCES} - {"meta/min_topk_margin"}
    for pattern in (*WHOLE, *sorted(kinds)):
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    norms = json.loads((SYSTEMS["unimoe-8e"] / "grad_norms.json").read_text())
    assert all(norms[run] for run in ("stage3", "all_except_towers"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_records_reach_every_medium(name: str):
    with np.load(SYSTEMS[name] / "inputs.npz") as inputs:
        used = {key for key in ("image_mask", "video_mask", "features_mask") if inputs[key].any()}
        prompts = [key for key in inputs if re.fullmatch(r"generate/\d+/input_ids", key)]
    expected = {"image_mask", "features_mask"}
    assert used == expected | ({"video_mask"} if name == "unimoe-8e" else set())
    assert len(prompts) == 4


def test_preprocessing_is_there():
    folder = FIXTURES / "preprocessing"
    with np.load(folder / "expected_uni.npz") as file:
        names = {split_key(key)[0]: file[key] for key in file}
    for image in ("rect", "gray", "rgba"):
        for aspect in ("square", "pad"):
            for what in ("56/uint8_chw", "56/pixel_values", "336/uint8_chw"):
                assert f"{image}/{aspect}/{what}" in names
    chunks = {key.split("/")[0]: int(names[key]) for key in names if key.endswith("/num_chunks")}
    assert sorted(chunks.values()) == [2]
    assert {"d_16k_beats/fbank_raw_unpadded", "kaldi_mel_banks_128"} <= set(names)
    templates = json.loads((folder / "templates_uni.json").read_text())
    assert sum("/v1/" in key for key in templates) == 12
    plain = json.loads((folder / "templates_cumo.json").read_text())
    assert {key.split("/")[2] for key in plain} == {p.name for p in folder.glob("tokenizers/*")}
