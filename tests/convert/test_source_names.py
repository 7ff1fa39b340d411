"""Prefixes of names that the original loaders ignore, and tensors that they skip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.convert import unimoe_folders
from tests.convert.cumo_folders import write_stage
from tests.convert.folders import write_file
from tests.convert.reading import read_all
from unimoe_jax.convert.family_plans import plan_of
from unimoe_jax.convert.plan import Resolution, resolve_plan
from unimoe_jax.convert.reader import ConvertError, open_file
from unimoe_jax.convert.recognise import recognise

PEFT = "base_model.model."


def resolved(root: Path) -> Resolution:
    return resolve_plan(plan_of(recognise([root])))


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.read()) for name, tensor in open_file(file).items()}


def rename(file: Path, rule: Callable[[str], str]) -> None:
    write_file(file, {rule(name): value for name, value in tensors_of(file).items()})


def same(before: dict[str, np.ndarray], root: Path) -> None:
    after = read_all(resolved(root))
    assert set(after) == set(before)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


# ---------------------------------------------------------------------- non_lora_trainables


@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("prefix", ["model.model.", "model.", "base_model.model."])
def test_prefixes_of_non_lora_trainables(tmp_path: Path, experts: int, prefix: str):
    unimoe_folders.write(tmp_path, experts)
    before = read_all(resolved(tmp_path))
    file = tmp_path / "tuned/non_lora_trainables.safetensors"
    rename(file, lambda name: prefix + name.removeprefix(f"{PEFT}model."))
    same(before, tmp_path)


@pytest.mark.parametrize("experts", [4, 8])
def test_later_files_override_non_lora_trainables(tmp_path: Path, experts: int):
    """non_lora_trainables may be older and hold earlier values of the aligner and the gates."""
    files = unimoe_folders.write(tmp_path, experts)
    before = read_all(resolved(tmp_path))
    later = files["tuned/mm_audio_aligner"] | files["tuned/mlp_gates"]
    file = tmp_path / "tuned/non_lora_trainables.safetensors"
    stale = {PEFT + name: value + 1 for name, value in later.items()}
    write_file(file, tensors_of(file) | stale)
    same(before, tmp_path)
    reasons = resolved(tmp_path).excused
    assert "loaded later" in reasons[f"tuned:{PEFT}model.query_tokens"]
    write_file(file, tensors_of(file) | {f"{PEFT}model.norm.weight": np.ones(3, np.float32)})
    with pytest.raises(ConvertError, match=r"not used.*model\.norm\.weight"):
        resolved(tmp_path)


def test_names_that_differ_in_their_prefix_only(tmp_path: Path):
    unimoe_folders.write(tmp_path, experts=4)
    file = tmp_path / "tuned/non_lora_trainables.safetensors"
    name = "model.mm_projector.0.bias"
    write_file(file, tensors_of(file) | {f"model.{name}": np.ones(8, np.float32)})
    with pytest.raises(ConvertError, match=r"non_lora_trainables.*prefixes only; remove one"):
        resolved(tmp_path)


# ------------------------------------------------------------------- projectors and aligners


@pytest.mark.parametrize("prefix", ["", "base_model.model.model.", "module.model."])
def test_prefixes_before_mm_projector_are_ignored_in_cumo(tmp_path: Path, prefix: str):
    folder = write_stage(tmp_path / "source", "pft")
    before = read_all(resolved(folder))
    rename(folder / "mm_projector.safetensors", lambda name: prefix + name.removeprefix("model."))
    same(before, folder)


@pytest.mark.parametrize("prefix", ["", "base_model.model.model.", "module.model."])
def test_prefixes_before_connectors_of_a_base_are_ignored(tmp_path: Path, prefix: str):
    """The queries of speech have no such name; they are the first tensor of their file."""
    files = unimoe_folders.write(tmp_path, experts=4)
    aligner, queries = files["tuned/mm_audio_aligner"], "model.query_tokens"
    shutil.rmtree(tmp_path / "tuned")
    projector = {
        name.removeprefix(PEFT): value for name, value in files["tuned/non_lora_trainables"].items()
    }
    sides = {"mm_projector": projector, "mm_audio_aligner": aligner}
    for stem, tensors in sides.items():
        write_file(tmp_path / f"base/{stem}.safetensors", tensors)
    before = read_all(resolved(tmp_path))
    assert next(iter(aligner)) == queries
    for stem in sides:
        rename(
            tmp_path / f"base/{stem}.safetensors",
            lambda name: "first" if name == queries else prefix + name.removeprefix("model."),
        )
    same(before, tmp_path)


# -------------------------------------------------------------------------- harmless tensors


@pytest.mark.parametrize("experts", [4, 8])
def test_cached_rotary_tables_are_skipped(tmp_path: Path, experts: int):
    unimoe_folders.write(tmp_path, experts)
    before = read_all(resolved(tmp_path))
    file = tmp_path / "base/model.safetensors"
    top = "model.layers.0.self_attn.rotary_emb"
    tables = {f"{top}.{part}_cached": np.ones((1, 1, 4, 4), np.float32) for part in ("cos", "sin")}
    write_file(file, tensors_of(file) | tables)
    same(before, tmp_path)


@pytest.mark.parametrize("experts", [4, 8])
def test_a_tied_head_is_skipped(tmp_path: Path, experts: int):
    unimoe_folders.write(tmp_path, experts)
    before = read_all(resolved(tmp_path))
    del before["lm_head/kernel"]
    for folder in ("base", "tuned"):
        file = tmp_path / folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    same(before, tmp_path)
    assert "tied" in resolved(tmp_path).excused["base:lm_head.weight"]


def test_the_last_norm_of_cumos_tower_is_skipped(tmp_path: Path):
    folder = write_stage(tmp_path / "source", "sft")
    before = read_all(resolved(folder))
    file = folder / "model.safetensors"
    top = "model.vision_tower.vision_model.post_layernorm"
    norm = {f"{top}.{part}": np.ones(8, np.float32) for part in ("weight", "bias")}
    write_file(file, tensors_of(file) | norm)
    same(before, folder)
