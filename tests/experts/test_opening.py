"""Which checkpoints the commands read: stages, run directories, PyTorch folders, adapters."""

from __future__ import annotations

import shutil

import numpy as np
import yaml

from tests.convert import unimoe_folders
from tests.convert.folders import llama_tensors, write_llama
from tests.experts.stages import EXPERTS, FFN, RUN, convert, model_of, run, write_stage
from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.checkpoints.manifest import read_manifest
from unimoe_jax.config.load import resolve_config


def test_a_pytorch_folder_is_a_source(tmp_path):
    source = write_llama(tmp_path / "llama", llama_tensors())
    out = tmp_path / "moe"
    arguments = ("--num-experts", 2, "--module", "decoder")
    assert run("upcycle", "--from", source, "--to", out, *arguments) == 0
    value = load_final(out)[EXPERTS]
    for layer in range(2):
        weight = llama_tensors()[f"model.layers.{layer}.mlp.up_proj.weight"]
        np.testing.assert_array_equal(value[layer], np.stack([weight.T, weight.T]))
    assert (out / "tokenizer_config.json").read_text() == "{}"
    assert not (out / "config.json").exists()  # config.json describes the PyTorch model only
    assert set(read_manifest(out)["hashes"]["base"]) == {str(source / "model.safetensors")}


def test_pytorch_folders_and_their_import_give_the_same(tmp_path):
    """Routers are those of released inference, and the tokenizer of the base is copied."""
    source = tmp_path / "source"
    unimoe_folders.write(source, experts=4)
    (source / "base" / "tokenizer.model").write_bytes(b"pieces")
    assert convert("import", "--from", source, "--to", tmp_path / "imported") == 0
    for name, base in (("direct", source), ("after", tmp_path / "imported")):
        assert run("prune", "--from", base, "--keep", "2,0", "--to", tmp_path / name) == 0
    direct, after = load_final(tmp_path / "direct"), load_final(tmp_path / "after")
    assert set(direct) == set(after)
    for path, value in after.items():
        np.testing.assert_array_equal(direct[path], value, err_msg=path)
    names = [{p.name for p in (tmp_path / n).iterdir()} for n in ("direct", "imported")]
    assert names[0] == names[1]
    assert "tokenizer.model" in names[0]


def test_a_run_directory_means_its_last_whole_stage(dense, tmp_path, capsys):
    folder = dense.parents[2]
    printed = []
    for place in (folder, dense.parent, dense):
        assert convert("inspect", place) == run("list", place) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    arguments = ("--to", tmp_path / "out", "--format", "cumo")
    assert convert("export", "--from", folder, *arguments) == 0
    capsys.readouterr()
    for place, message in (
        (folder / "checkpoints", f"name one, e.g. {dense}"),
        (dense / "params", "name the folder around params"),
    ):
        assert convert("inspect", place) == run("list", place) == 2
        assert capsys.readouterr().err.count(message) == 2
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copyfile(folder / "config.yaml", tmp_path / "run" / "config.yaml")
    assert convert("inspect", tmp_path / "run") == 2
    assert "RUN/checkpoints/STAGE/final" in capsys.readouterr().err


def test_adapters_are_merged(tmp_path, settings):
    """The stage has separate adapters; experts that are split off have them in their kernels."""
    moe = resolve_config(
        RUN,
        [
            *(
                "model.decoder.vocab_size=16",
                "model.decoder.hidden_size=8",
                "model.decoder.mlp_dim=6",
            ),
            *("model.decoder.num_heads=2", "model.decoder.num_kv_heads=1", "stages.sft.moe=true"),
            "model.decoder.moe={num_experts: 2}",
            "stages.sft.lora=[{match: 'decoder/.*/moe/experts/.*', rank: 2, alpha: 6}]",
            "stages.sft.init=[{match: '.*', source: fresh}]",
        ],
    ).config
    final = write_stage(tmp_path / "run", moe, "sft", 3)
    arguments = ("split", "--from", final, "--to", tmp_path / "cut", "--module", "decoder")
    assert run(*arguments) == 0
    base = load_final(final)
    a, b = (base[EXPERTS.replace("kernel", name)] for name in ("lora_a", "lora_b"))
    for expert in range(2):
        params = load_final(tmp_path / "cut" / f"expert_{expert}")
        assert not [path for path in params if "lora" in path]
        expected = base[EXPERTS][:, expert] + 3 * a[:, expert] @ b[:, expert]
        np.testing.assert_allclose(params[FFN], expected, rtol=1e-6, atol=1e-6)
    assert not model_of(tmp_path / "cut" / "expert_0").lora


def test_settings_can_be_named(dense, tmp_path, capsys):
    """Outside its run directory, the checkpoint of a stage needs --model."""
    alone = tmp_path / "a" / "b" / "c"
    shutil.copytree(dense, alone)
    arguments = ("upcycle", "--from", alone, "--num-experts", 2, "--module", "connector")
    assert run(*arguments, "--to", tmp_path / "x") == 2
    assert "--model FILE" in capsys.readouterr().err
    run_file = dense.parents[2] / "config.yaml"
    model = tmp_path / "model.yaml"
    content = yaml.safe_load(run_file.read_text())["model"]
    content["vision"]["encoder"]["moe"] = None
    content["vision"]["connector"]["moe"] = None
    model.write_text(yaml.safe_dump({"model": content}))
    assert run(*arguments, "--to", tmp_path / "x", "--model", model) == 0
    assert model_of(tmp_path / "x").vision.connector.moe.num_experts == 2
