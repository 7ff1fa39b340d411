"""Small files of a checkpoint: damaged ones are named in one line, and edited ones are used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.generate.conftest import tokenizer_folder
from unimoe_jax.checkpoints.checksums import seal
from unimoe_jax.checkpoints.manifest import run_file_of
from unimoe_jax.config import ConfigError
from unimoe_jax.config.load import dump_config, load_config
from unimoe_jax.data.sources import load_tokenizer
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.generate import __main__ as generate
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.found import find
from unimoe_jax.generate.generation_config import generation_settings


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint with an empty `params`, which is read after the small files."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("params"))
    (folder / "params").mkdir()
    return folder


def error_line(capsys, folder: Path) -> str:
    """The message of a command that asks the model in `folder` and fails."""
    assert generate.main(["--model", str(folder), "--prompt", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def write_result(final: Path) -> None:
    """The folder that the stage `tune` leaves, without parameters."""
    (final / "params").mkdir(parents=True)
    (final / "manifest.json").write_text('{"stage": "tune"}')
    seal(final)


@pytest.mark.parametrize("text", ["{", "[]", ": [", "5", ""])
@pytest.mark.parametrize("name", ["manifest.json", "model.yaml", "tokenizer.model"])
def test_broken_small_files(copy, capsys, name, text):
    (copy / name).write_text(text)
    assert error_line(capsys, copy).startswith(f"error: {copy / name}: damaged")
    if name == "tokenizer.model" or text in ("[]", "5", ""):
        seal(copy)  # the checksum is right now, so the content is parsed
        assert error_line(capsys, copy).startswith(f"error: {copy}")


def test_generation_config_may_be_edited(copy):
    (copy / "NOTES.txt").write_text("mine")
    given = {"do_sample": True, "temperature": 0.5}
    (copy / "generation_config.json").write_text(json.dumps(given))
    _, sampling, _ = generation_settings(find(copy, None))
    assert sampling.temperature == 0.5


def test_null_in_generation_config_is_no_setting(copy):
    file = copy / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True}))
    without_keys = generation_settings(find(copy, None))
    keys = ("eos_token_id", "temperature", "top_p", "top_k", "max_new_tokens", "min_new_tokens")
    file.write_text(json.dumps({"do_sample": True} | dict.fromkeys((*keys, "num_beams"))))
    assert generation_settings(find(copy, None)) == without_keys
    eos, sampling, notes = without_keys
    assert (eos, sampling.temperature, notes) == ((2,), 1.0, ())


@pytest.mark.parametrize("value", ["x", 10**12, [2, "x"], True, [2, False]])
def test_end_tokens_are_ids(copy, value):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(GenerationError, match=r"eos_token_id = .*; allowed"):
        generation_settings(find(copy, None))


def test_a_tokenizer_of_another_model(copy, capsys):
    """Every piece beyond the embedding would silently read its last row."""
    content = yaml.safe_load((copy / "model.yaml").read_text())
    content["model"]["decoder"]["vocab_size"] -= 1
    (copy / "model.yaml").write_text(yaml.safe_dump(content))
    seal(copy)
    line, pieces = error_line(capsys, copy), Tokenizer.load(copy).vocab_size
    assert f"{pieces} pieces" in line
    assert f"vocab_size is {pieces - 1}" in line
    overrides = [f"tokenizer={copy}", f"model.decoder.vocab_size={pieces - 1}"]
    config = load_config("configs/run/tiny.yaml", overrides)
    with pytest.raises(ConfigError, match=f"has {pieces} pieces, but model.decoder.vocab_size"):
        load_tokenizer(config)


@pytest.mark.parametrize("named", ["folder", "file"])
def test_settings_beside_the_tokenizer_of_a_run(tmp_path, named):
    """The `tokenizer` setting of a run may name a folder or the file in it."""
    source, run = tokenizer_folder(), tmp_path / "run"
    beside = tmp_path / "base"
    shutil.copytree(source, beside)
    (beside / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    write_result(run / "checkpoints/tune/final")
    overrides = [
        f"tokenizer={beside if named == 'folder' else beside / 'tokenizer.model'}",
        f"model.decoder.vocab_size={Tokenizer.load(source).vocab_size}",
    ]
    config = load_config("configs/run/tiny.yaml", overrides)
    (run / "config.yaml").write_text(dump_config(config))
    assert find(run, None).generation == {"max_new_tokens": 7}


@pytest.mark.parametrize("named", ["..", "link to the stage", "link to another disk"])
def test_a_stage_is_found_by_any_path_that_leads_to_it(tmp_path, named):
    run = tmp_path / "run"
    final = run / "checkpoints/tune/final"
    write_result(final)
    overrides = [f"tokenizer={tokenizer_folder()}", "model.decoder.vocab_size=400"]
    (run / "config.yaml").write_text(dump_config(load_config("configs/run/tiny.yaml", overrides)))
    path = run / "checkpoints/../checkpoints/align/../tune/final"
    if named == "..":
        (run / "checkpoints/align").mkdir()
    elif named == "link to the stage":
        path = tmp_path / "link"
        path.symlink_to(final)
    else:
        path = final
        (run / "checkpoints").rename(tmp_path / "disk")
        (run / "checkpoints").symlink_to(tmp_path / "disk")
    assert find(path, None).config.decoder.moe.num_experts == 4
    assert run_file_of(path) == run / "config.yaml"
