"""The command line on tiny folders: import and export, and refusals that leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from tests.convert.folders import CONFIG, llama_tensors, write_llama
from unimoe_jax.checkpoints.final import load_final, open_source
from unimoe_jax.config import ModelConfig
from unimoe_jax.convert import exporting, writer
from unimoe_jax.convert.__main__ import main
from unimoe_jax.convert.reader import ConvertError, open_folder, sha256
from unimoe_jax.convert.recognise import recognise
from unimoe_jax.experts.__main__ import main as experts_main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source", llama_tensors())


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_import_can_be_taken_from(source: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert run("import", "--from", source, "--to", out) == 0
    tensors, params = llama_tensors(), load_final(out)
    stacked = params["decoder/run_0/block_0/mlp/up_proj/kernel"]
    for layer in range(2):
        weight = tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        np.testing.assert_array_equal(stacked[layer], weight.T)
    np.testing.assert_array_equal(params["lm_head/kernel"], tensors["lm_head.weight"].T)
    taken = open_source("converted", out)
    assert taken.moe_layers == (False, False)
    assert taken.shapes["embed/embedding"] == tensors["model.embed_tokens.weight"].shape
    config = ModelConfig.model_validate(yaml.safe_load((out / "model.yaml").read_text())["model"])
    assert config.decoder.num_kv_heads == CONFIG["num_key_value_heads"]
    assert (out / "tokenizer_config.json").read_text() == "{}"
    manifest = json.loads((out / "manifest.json").read_text())
    file = str(source / "model.safetensors")
    assert manifest["tensor_groups"]["decoder"]["sources"] == {file: sha256(Path(file))}
    printed = capsys.readouterr().out
    assert "o i -> i o" in printed
    assert printed.splitlines()[-1].startswith("OK")


def test_an_import_is_not_imported_again(source: Path, tmp_path: Path, capsys):
    assert run("import", "--from", source, "--to", tmp_path / "out") == 0
    for given in (tmp_path / "out", tmp_path):  # a folder of folders means all folders in it
        assert run("import", "--from", given, "--to", tmp_path / "again") == 2
        assert f"{tmp_path / 'out'}: is a checkpoint of this package" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["import", "export", "experts"])
def test_an_interrupt_leaves_nothing_behind(source, tmp_path, capsys, monkeypatch, program):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    out, more = tmp_path / "out", ("--num-experts", "2", "--module", "decoder")
    if program == "export":
        assert run("import", "--from", source, "--to", tmp_path / "in") == 0
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(writer, "write_chunk", interrupt)
    monkeypatch.setattr(exporting, "write_safetensors", interrupt)
    capsys.readouterr()
    code = {
        "import": lambda: run("import", "--from", source, "--to", out),
        "export": lambda: run("export", "--from", tmp_path / "in", "--to", out, "--format", "hf"),
        "experts": lambda: experts_main(
            ["upcycle", "--from", str(source), "--to", str(out), *more]
        ),
    }[program]()
    assert code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_is_bit_identical(tmp_path: Path, files: str, dtype, capsys):
    tensors = {name: value.astype(dtype) for name, value in llama_tensors().items()}
    source = write_llama(tmp_path / "source", tensors)
    assert run("import", "--from", source, "--to", tmp_path / "a") == 0
    out = tmp_path / "b"
    arguments = ("--from", tmp_path / "a", "--to", out, "--format", "hf", "--files", files)
    assert run("export", *arguments) == 0
    again = open_folder(out / "decoder")
    assert set(again) == set(tensors)
    for name, value in tensors.items():
        assert again[name].read().tobytes() == value.tobytes(), name
    assert run("import", "--from", out, "--to", tmp_path / "c") == 0
    capsys.readouterr()
    assert run("verify", tmp_path / "a", tmp_path / "c") == 0
    assert "largest difference 0," in capsys.readouterr().out


def test_verify_finds_a_difference(source: Path, tmp_path: Path, capsys):
    assert run("import", "--from", source, "--to", tmp_path / "a") == 0
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 0.5
    other = write_llama(tmp_path / "other", tensors)
    assert run("verify", tmp_path / "a", other) == 1
    assert "mlp/down_proj/kernel: largest difference 0.5" in capsys.readouterr().out


def test_verify_takes_experts_of_any_width(tmp_path: Path, capsys):
    """transformers uses torch's grouped product, which needs rows of a multiple of 16 bytes."""
    pytest.importorskip("torch")
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 7, "hidden_size": 6, "intermediate_size": 5, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, sliding_window=None))
    model.save_pretrained(tmp_path / "in")
    assert run("import", "--from", tmp_path / "in", "--to", tmp_path / "a") == 0
    assert run("verify", tmp_path / "in", tmp_path / "a") == 0
    assert "in: transformers" in capsys.readouterr().out


def test_inspect_counts(source: Path, capsys):
    assert run("inspect", source) == 0
    count = sum(value.size for value in llama_tensors().values())
    assert f"total {count:,} parameters" in capsys.readouterr().out


def _without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


BROKEN = {
    "unused": (lambda t: t | {"model.extra": np.zeros(3, np.float32)}, {}, ["model.extra", "(3,)"]),
    "missing": (
        lambda t: _without(t, "model.layers.1.self_attn.o_proj.weight"),
        {},
        ["o_proj/kernel", "model.layers.1.self_attn.o_proj.weight"],
    ),
    "shape": (
        lambda t: t | {"model.norm.weight": np.zeros(9, np.float32)},
        {},
        ["model.safetensors", "model.norm.weight", "(9,)", "(8,)"],
    ),
    "config": (lambda t: t, {"attention_bias": True}, ["attention_bias"]),
    "family": (lambda t: t, {"model_type": "gpt2"}, ["gpt2"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refusals_name_the_fault_and_leave_nothing(case: str, tmp_path: Path, capsys):
    change, config, words = BROKEN[case]
    source = write_llama(tmp_path / "source", change(llama_tensors()), **config)
    assert run("import", "--from", source, "--to", tmp_path / "out") == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_failure_while_writing_leaves_nothing(source: Path, tmp_path: Path, monkeypatch, capsys):
    def broken(plan, copy):
        raise ConvertError(f"{copy.src}: cannot be read")

    monkeypatch.setattr("unimoe_jax.convert.importing.read_slice", broken)
    assert run("import", "--from", source, "--to", tmp_path / "out") == 2
    assert "cannot be read" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_existing_target_is_not_touched(source: Path, tmp_path: Path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert run("import", "--from", source, "--to", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_damaged_checkpoint_is_not_exported(source: Path, tmp_path: Path, capsys):
    assert run("import", "--from", source, "--to", tmp_path / "a") == 0
    data = tmp_path / "a/params/decoder/run_0/block_0/mlp/up_proj/kernel/1.0.0"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    out = tmp_path / "b"
    assert run("export", "--from", tmp_path / "a", "--to", out, "--format", "hf") == 2
    assert "damaged" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("format_", ["cumo", "unimoe"])
def test_a_format_that_does_not_fit_is_one_line(source: Path, tmp_path: Path, format_: str, capsys):
    assert run("import", "--from", source, "--to", tmp_path / "a") == 0
    capsys.readouterr()
    out = tmp_path / "b"
    assert run("export", "--from", tmp_path / "a", "--to", out, "--format", format_) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'a'}: format {format_} holds a vision encoder")
    assert "hf (decoder and encoders" in line
    assert not out.exists()


def test_the_manifest_names_licences(source: Path, tmp_path: Path):
    (source / "README.md").write_text("---\ntags: [x]\nlicense: llama2\n---\n# Model\n")
    (source / "LICENSE.txt").write_text("terms")
    assert run("import", "--from", source, "--to", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["licences"] == {"decoder": [str(source / "LICENSE.txt"), "llama2"]}


def test_plain_orbax_restores_an_import(source: Path, tmp_path: Path):
    assert run("import", "--from", source, "--to", tmp_path / "out") == 0
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out" / "params")
    stacked = restored["decoder/run_0/block_0/attention/q_proj/kernel"]
    for layer in range(2):
        weight = llama_tensors()[f"model.layers.{layer}.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(np.asarray(stacked)[layer], weight.T)


def test_folder_names_do_not_matter(source: Path, tmp_path: Path):
    source.rename(tmp_path / "whisper-clip-mixtral")
    (found,) = recognise([tmp_path / "whisper-clip-mixtral"])
    assert found.role == "decoder"
