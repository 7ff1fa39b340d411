"""Damaged and hostile input on the command line: exit code 2, one message, no output folder."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.convert import unimoe_folders
from tests.convert.folders import CONFIG, llama_tensors, write_file, write_llama
from unimoe_jax.convert.__main__ import main


def refused(source: Path, capsys, *words: str) -> None:
    """An import of `source` names all `words`, and leaves nothing."""
    out = source.parent / "out"
    assert main(["import", "--from", str(source), "--to", str(out)]) == 2
    printed = capsys.readouterr()
    for word in words:
        assert word in printed.err, printed.err
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name]


# ------------------------------------------------------------------------------ settings

SETTINGS = {
    "lacking": ({"vocab_size": None}, ["config.json", "'vocab_size'"]),
    "text": ({"hidden_size": "eight"}, ["DecoderConfig: hidden_size", "valid integer"]),
    "heads": ({"num_attention_heads": 3}, ["hidden_size = 8", "num_heads = 3"]),
    "zero": ({"num_attention_heads": 0}, ["num_heads"]),
    "list": ({"rope_scaling": [1]}, ["describes no model"]),
    "deep": ({"num_hidden_layers": 10**12}, ["num_hidden_layers", "1,000,000,000,000"]),
    "wide": ({"vocab_size": 10**15}, ["sizes beyond any model"]),
    "number": ({"model_type": 5}, ["model_type '5'"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_describe_no_model(case: str, tmp_path: Path, capsys):
    change, words = SETTINGS[case]
    source = write_llama(tmp_path / "source", llama_tensors())
    changed = {key: value for key, value in (CONFIG | change).items() if value is not None}
    (source / "config.json").write_text(json.dumps(changed))
    refused(source, capsys, *words)


# -------------------------------------------------------------------------------- shards


def shards(folder: Path, change=lambda index: index, repeat: int = 0) -> Path:
    """Write a LLaMA folder with two shards; `change` is applied to its index."""
    folder.mkdir()
    tensors = llama_tensors()
    names = list(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5 - repeat :]}
    for file, members in parts.items():
        write_file(folder / file, {name: tensors[name] for name in members})
    index = {name: file for file, members in parts.items() for name in members}
    text = json.dumps({"weight_map": change(index)})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_missing_shard(tmp_path: Path, capsys):
    source = shards(tmp_path / "source")
    (source / "b.safetensors").unlink()
    refused(source, capsys, "b.safetensors: no such file")


def test_a_tensor_in_two_shards(tmp_path: Path, capsys):
    source = shards(tmp_path / "source", repeat=1)
    name = list(llama_tensors())[4]
    refused(source, capsys, name, "a.safetensors", "b.safetensors")


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "sub/b.safetensors"])
def test_an_index_that_leaves_its_folder(file: str, tmp_path: Path, capsys):
    source = shards(tmp_path / "source", lambda index: index | {"lm_head.weight": file})
    refused(source, capsys, "index.json", "outside", file)


def test_an_index_that_names_another_shard(tmp_path: Path, capsys):
    wrong = {"lm_head.weight": "b.safetensors"}
    source = shards(tmp_path / "source", lambda index: index | wrong)
    refused(source, capsys, "lm_head.weight", "'b.safetensors'", "'a.safetensors'")


def test_a_truncated_shard(tmp_path: Path, capsys):
    source = shards(tmp_path / "source")
    content = (source / "b.safetensors").read_bytes()
    (source / "b.safetensors").write_bytes(content[:-1])
    refused(source, capsys, "b.safetensors: truncated: tensor", "of shape (8,)")


# --------------------------------------------------------------------------- torch files


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_a_pickle_payload_does_not_run(tmp_path: Path, capsys):
    torch = pytest.importorskip("torch")
    source = write_llama(tmp_path / "source", llama_tensors())
    (source / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(2), "y": Evil(source / "canary")}, source / "pytorch_model.bin")
    refused(source, capsys, "pytorch_model.bin: refused: it holds more than tensors", "mkdir")
    assert not (source / "canary").exists()


@pytest.mark.parametrize("kind", ["complex64", "int64", "float8_e4m3fn"])
def test_weights_are_real_numbers(kind: str, tmp_path: Path, capsys):
    torch = pytest.importorskip("torch")
    source = write_llama(tmp_path / "source", llama_tensors())
    (source / "model.safetensors").unlink()
    state = {name: torch.from_numpy(value) for name, value in llama_tensors().items()}
    state["lm_head.weight"] = torch.zeros(11, 8, dtype=getattr(torch, kind))
    torch.save(state, source / "pytorch_model.bin")
    refused(source, capsys, "pytorch_model.bin", "lm_head.weight", "(11, 8)", kind)


# -------------------------------------------------------------------------- whole systems

LACKING = {
    "clip": ("clip", "needs its clip folder"),
    "whisper": ("whisper", "Whisper or BEATs"),
    "base": ("base", "needs its base folder"),
    "experts": ("experts", "needs its experts folder"),
    "one expert": ("experts/mlp_base4.safetensors", "expert 4 needs mlp_base4"),
    "one rank": ("tuned/3_mlp_experts.safetensors", "[0, 1, 2, 4, 5, 6, 7]"),
    "last rank": ("tuned/7_mlp_experts.safetensors", "8 experts cannot be in 7 rank files"),
    "routers": ("tuned/mlp_gates.safetensors", "lacks ['mlp_gates']"),
    "connector": ("tuned/mm_audio_aligner.safetensors", "lacks ['mm_audio_aligner']"),
    "adapter settings": ("tuned/adapter_config.json", "adapter_config.json: no such file"),
}


@pytest.mark.parametrize("case", LACKING)
def test_an_incomplete_8e_is_never_filled_up_from_elsewhere(case: str, tmp_path: Path, capsys):
    what, words = LACKING[case]
    source = tmp_path / "source"
    unimoe_folders.write(source, experts=8)
    (shutil.rmtree if (source / what).is_dir() else Path.unlink)(source / what)
    refused(source, capsys, words)


def test_adapters_of_another_rank_than_their_settings(tmp_path: Path, capsys):
    source = tmp_path / "source"
    unimoe_folders.write(source, experts=4)
    (source / "tuned/adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 4}))
    refused(source, capsys, "adapter_model.safetensors", "(2, 8)", "r = 3")


# ----------------------------------------------------------------------------------- disk


def wide_llama(folder: Path) -> Path:
    """Write a LLaMA folder of about 200 kB."""
    tensors = llama_tensors() | {"model.embed_tokens.weight": np.zeros((3000, 8), np.float32)}
    tensors["lm_head.weight"] = np.ones((3000, 8), np.float32)
    return write_llama(folder, tensors, vocab_size=3000)


def test_a_disk_that_fills_up(tmp_path: Path, capsys):
    source = wide_llama(tmp_path / "source")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        refused(source, capsys, "out: cannot be written", "too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_too_small(tmp_path: Path, capsys, monkeypatch):
    source = wide_llama(tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(source, capsys, "needs", "1,000 left")
