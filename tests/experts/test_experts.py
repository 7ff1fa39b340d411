"""`python -m unimoe_jax.experts` on small checkpoints: there and back, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.convert import unimoe_folders
from tests.convert.folders import llama_tensors, write_llama
from unimoe_jax.checkpoints.final import load_final, open_source, save_final
from unimoe_jax.checkpoints.manifest import read_manifest
from unimoe_jax.config import ModelConfig, RunConfig, Take
from unimoe_jax.config.load import dump_config, resolve_config
from unimoe_jax.convert.__main__ import main as convert_main
from unimoe_jax.convert.plan import parameter_shapes
from unimoe_jax.convert.writer import EmptyArrays
from unimoe_jax.experts.__main__ import main

RUN = Path(__file__).parents[2] / "configs/run/cumo_tiny.yaml"
FFN = "decoder/run_0/block_0/mlp/up_proj/kernel"
EXPERTS = "decoder/run_0/block_0/moe/experts/up_proj/kernel"
ENCODER = "vision/encoder/layers/moe/experts/fc1/kernel"
UNREAD = "vision/encoder/unread_layers/moe/experts/fc1/kernel"
CONNECTOR = "vision/connector/moe/experts/fc1/kernel"


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def convert(*arguments) -> int:
    return convert_main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def settings() -> RunConfig:
    small = ["vocab_size=16", "hidden_size=8", "mlp_dim=6", "num_heads=2", "num_kv_heads=1"]
    eyes = ["hidden_size=8", "mlp_dim=6", "num_heads=2", "num_layers=3"]
    overrides = [f"model.decoder.{text}" for text in small]
    overrides += [f"model.vision.encoder.{text}" for text in eyes]
    return resolve_config(RUN, overrides).config


def leave(folder: Path, settings: RunConfig, stage_name: str, seed: int) -> Path:
    """What stage `stage_name` of a run in `folder` would leave: random numbers."""
    stage = next(stage for stage in settings.stages if stage.name == stage_name)
    model = settings.stage_model(stage)
    generator = np.random.default_rng(seed)
    shapes = parameter_shapes(model, [""])
    params = {path: generator.standard_normal(s).astype("f4") for path, s in shapes.items()}
    final = folder / "checkpoints" / stage_name / "final"
    manifest = {
        "stage": stage_name,
        "moe_layers": list(model.decoder.moe_layers()),
        "init": [take.model_dump(exclude_none=True) for take in stage.init],
        "shapes": {path: list(shape) for path, shape in shapes.items()},
    }
    save_final(final, params, manifest)
    (folder / "config.yaml").write_text(dump_config(settings))
    return final


@pytest.fixture(scope="module")
def dense(tmp_path_factory, settings) -> Path:
    return leave(tmp_path_factory.mktemp("run"), settings, "pft", 1)


@pytest.fixture(scope="module")
def other(tmp_path_factory, settings) -> Path:
    return leave(tmp_path_factory.mktemp("other"), settings, "pft", 2)


@pytest.fixture(scope="module")
def everything(tmp_path_factory, dense) -> Path:
    """All three modules upcycled."""
    out = tmp_path_factory.mktemp("up") / "moe"
    modules = ("--module", "encoder", "--module", "connector", "--module", "decoder")
    assert run("upcycle", "--from", dense, "--to", out, "--num-experts", 3, *modules) == 0
    return out


def model_of(folder: Path) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((folder / "model.yaml").read_text())["model"])


def test_upcycle_fills_the_model_that_it_describes(everything, dense):
    model, params, base = model_of(everything), load_final(everything), load_final(dense)
    assert {path: value.shape for path, value in params.items()} == parameter_shapes(model, [""])
    assert {name: moe.num_experts for name, moe in model.experts().items()} == {
        "encoder": 3,
        "connector": 3,
        "decoder": 3,
    }
    assert model.vision.encoder.moe.router.dtype_order == "softmax_cast_topk"
    for path, dense_path in (
        (EXPERTS, FFN),
        (ENCODER, "vision/encoder/layers/mlp/fc1/kernel"),
        (UNREAD, "vision/encoder/unread_layers/mlp/fc1/kernel"),
        (CONNECTOR, "vision/connector/fc1/kernel"),
    ):
        for expert in range(3):
            experts = params[path][expert] if path == CONNECTOR else params[path][:, expert]
            np.testing.assert_array_equal(experts, base[dense_path])
    for path in base.keys() & params.keys():
        np.testing.assert_array_equal(params[path], base[path])


def test_routers_start_as_the_model_would_start_them(everything):
    params = load_final(everything)
    encoder = params["vision/encoder/layers/moe/router/linear/kernel"]
    assert np.abs(encoder).max() <= 8**-0.5 and np.abs(encoder).max() > 0.5 * 8**-0.5
    decoder = params["decoder/run_0/block_0/moe/router/linear/kernel"]
    assert 0.01 < decoder.std() < 0.03
    assert len({row.tobytes() for row in decoder}) == len(decoder), "every layer has its own"


def test_the_manifest_names_parents_and_hashes(everything, dense, capsys):
    manifest = read_manifest(everything)
    assert manifest["parents"] == {"base": str(dense)}
    assert set(manifest["hashes"]["base"]) == {"XXH3SUMS.json"}
    assert manifest["experts"]["encoder"] == ["base"] * 3
    assert manifest["command"].startswith("python -m unimoe_jax.experts upcycle --from")
    assert open_source("up", everything).moe_layers == (True, True, True)
    assert run("list", everything, "--compare") == 0
    printed = capsys.readouterr().out
    assert "decoder     3 of 3: 0–2" in printed
    assert "encoder expert 2  from base  largest difference from expert 0: 0" in printed


def test_assemble_names_every_expert(dense, other, tmp_path, capsys):
    out = tmp_path / "moe"
    experts = ("--expert", f"new={other}", "--expert", f"old={dense}", "--expert", f"new={other}")
    arguments = ("assemble", "--from", dense, "--to", out, *experts, "--layers", "even")
    assert run(*arguments) == 0
    params, base, new = load_final(out), load_final(dense), load_final(other)
    assert list(read_manifest(out)["moe_layers"]) == [True, False, True]
    assert params[EXPERTS].shape[:2] == (1, 3)  # layer 0; layer 2 is a run of its own
    for expert, source in enumerate((new, base, new)):
        np.testing.assert_array_equal(params[EXPERTS][0, expert], source[FFN][0])
    assert {path: v.shape for path, v in params.items()} == parameter_shapes(model_of(out), [""])
    assert read_manifest(out)["experts"] == {"decoder": ["new", "old", "new"]}
    capsys.readouterr()
    assert run("list", out) == 0
    assert "decoder expert 1  from old" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("take", "origins"),
    [
        ({"upcycle": "pft"}, ["pft"] * 4),
        ({"experts": ["pft", "pt", "a", "b"]}, ["pft", "pt", "a", "b"]),
        ({"source": "pft"}, [f"pft expert {number}" for number in range(4)]),
    ],
)
def test_what_a_stage_left_has_origins(take, origins, tmp_path, settings, capsys):
    stage = next(stage for stage in settings.stages if stage.name == "sft")
    init = (Take(match="vision/.*/moe/experts/.*", **take), Take(match=".*", source="fresh"))
    run_of = settings.model_copy(update={"stages": (stage.model_copy(update={"init": init}),)})
    assert run("list", leave(tmp_path, run_of, "sft", 4)) == 0
    printed = capsys.readouterr().out.splitlines()
    for expert, origin in enumerate(origins):
        assert f"encoder expert {expert}  from {origin}" in printed
        assert f"connector expert {expert}  from {origin}" in printed


@pytest.mark.parametrize("whole", [False, True])
def test_split_undoes_assemble(dense, other, tmp_path, whole):
    moe, cut = tmp_path / "moe", tmp_path / "cut"
    experts = ("--expert", f"a={other}", "--expert", f"b={dense}")
    assert run("assemble", "--from", dense, "--to", moe, *experts, "--layers", "0,1") == 0
    assert run("split", "--from", moe, "--to", cut, *(["--whole"] if whole else [])) == 0
    first, base, new = load_final(cut / "expert_0"), load_final(dense), load_final(other)
    np.testing.assert_array_equal(first[FFN][:2], new[FFN][:2])
    np.testing.assert_array_equal(first[FFN][2], base[FFN][2])  # was dense all the time
    assert set(first) == (set(base) if whole else {p for p in base if "/mlp/" in p and p[0] == "d"})
    second = load_final(cut / "expert_1")
    for path, value in second.items():
        np.testing.assert_array_equal(value, base[path])
    if not whole:  # what was split can be assembled again
        again = ("--expert", f"a={cut / 'expert_0'}", "--expert", f"b={cut / 'expert_1'}")
        out = tmp_path / "again"
        assert run("assemble", "--from", dense, "--to", out, *again, "--layers", "0,1") == 0
        for path, value in load_final(moe).items():
            np.testing.assert_array_equal(load_final(out)[path], value)


def test_prune_keeps_rows_of_the_router(everything, tmp_path):
    out = tmp_path / "two"
    assert run("prune", "--from", everything, "--to", out, "--keep", "2,0") == 0
    before, after = load_final(everything), load_final(out)
    assert {path: v.shape for path, v in after.items()} == parameter_shapes(model_of(out), [""])
    assert model_of(out).decoder.moe.top_k == 2
    router = "vision/connector/moe/router/linear/kernel"
    np.testing.assert_array_equal(after[router], before[router][:, [2, 0]])
    np.testing.assert_array_equal(after[ENCODER], before[ENCODER][:, [2, 0]])
    one = tmp_path / "one"
    only = ("--keep", 1, "--module", "encoder")
    assert run("prune", "--from", everything, "--to", one, *only) == 0
    assert model_of(one).vision.encoder.moe.top_k == 1
    assert model_of(one).decoder.moe.num_experts == 3


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
    assert not (out / "config.json").exists()  # PyTorch's, not of this package's model
    assert set(read_manifest(out)["hashes"]["base"]) == {str(source / "model.safetensors")}


def test_pytorch_folders_give_what_their_import_gives(tmp_path):
    """Merged adapters leave routers as released inference has them; the base's tokenizer comes."""
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


def test_a_run_directory_stands_for_its_last_whole_stage(dense, tmp_path, capsys):
    folder = dense.parents[2]
    printed = []
    for place in (folder, dense.parent, dense):
        assert convert("inspect", place) == run("list", place) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    arguments = ("--to", tmp_path / "out", "--format", "cumo")
    assert convert("export", "--from", folder, *arguments) == 0
    capsys.readouterr()
    for place, said in (
        (folder / "checkpoints", f"name one, e.g. {dense}"),
        (dense / "params", "name the folder around params"),
    ):
        assert convert("inspect", place) == run("list", place) == 2
        assert capsys.readouterr().err.count(said) == 2
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copyfile(folder / "config.yaml", tmp_path / "run" / "config.yaml")
    assert convert("inspect", tmp_path / "run") == 2
    assert "RUN/checkpoints/STAGE/final" in capsys.readouterr().err


def test_adapters_are_merged(tmp_path, settings):
    """A stage that leaves its adapters apart: what is split off holds them in its kernels."""
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
    final = leave(tmp_path / "run", moe, "sft", 3)
    arguments = ("split", "--from", final, "--to", tmp_path / "cut", "--module", "decoder")
    assert run(*arguments) == 0
    base = load_final(final)
    a, b = (base[EXPERTS.replace("kernel", name)] for name in ("lora_a", "lora_b"))
    for expert in range(2):
        params = load_final(tmp_path / "cut" / f"expert_{expert}")
        assert not [path for path in params if "lora" in path]
        wanted = base[EXPERTS][:, expert] + 3 * a[:, expert] @ b[:, expert]
        np.testing.assert_allclose(params[FFN], wanted, rtol=1e-6, atol=1e-6)
    assert not model_of(tmp_path / "cut" / "expert_0").lora


# ------------------------------------------------------------------------------- bad input


def refusals(dense: Path, moe: Path) -> dict[str, tuple[tuple, str]]:
    up = ("upcycle", "--from", dense, "--num-experts", 2)
    return {
        "nowhere": (("list", dense / "none"), "no such folder"),
        "not a checkpoint": (("list", dense / "params"), "params"),
        "no such module": ((*up, "--module", "ears", "--to", "x"), "invalid choice"),
        "top-k": ((*up, "--module", "encoder", "--top-k", 3, "--to", "x"), "top_k = 3 is larger"),
        "there already": ((*up, "--module", "encoder", "--to", moe), "exists already"),
        "experts already": (
            ("upcycle", "--from", moe, "--num-experts", 2, "--module", "encoder", "--to", "x"),
            "its encoder has 3 experts already",
        ),
        "dense": (("split", "--from", dense, "--to", "x"), "has no experts"),
        "no such expert": (
            ("prune", "--from", moe, "--keep", "0,7", "--to", "x"),
            "no expert 7 in its encoder; allowed: 0..2",
        ),
        "twice": (("prune", "--from", moe, "--keep", "1,1", "--to", "x"), "named twice"),
        "name": (
            ("assemble", "--from", dense, "--expert", str(dense), "--to", "x"),
            "write NAME=DIR",
        ),
        "lacks layers": (
            ("assemble", "--from", dense, "--expert", f"a={moe}", "--top-k", 1, "--to", "x"),
            "has no 'decoder/run_0/block_0/mlp/",
        ),
        "seed": ((*up, "--module", "encoder", "--seed", -1, "--to", "x"), "--seed -1: allowed: 0"),
        "keep": (
            ("prune", "--from", moe, "--keep", "a,b", "--to", "x"),
            "numbers from 0 up, like 0,2",
        ),
        "layers": (
            (*up, "--module", "decoder", "--layers", "0,x", "--to", "x"),
            "--layers: '0,x': allowed: numbers from 0 up, like 0,2, or one of all, even,",
        ),
        "named layers": (
            (*up, "--module", "decoder", "--layers", "odd", "--to", "x"),
            "--layers: 'odd': allowed: numbers from 0 up, like 0,2, or one of all, even,",
        ),
        "beyond": (
            (*up, "--module", "decoder", "--layers", "0,9", "--to", "x"),
            "[9] are beyond num_layers = 3",
        ),
    }


@pytest.mark.parametrize("case", refusals(Path("a"), Path("b")))
def test_bad_input_is_one_line_and_leaves_nothing(
    case, dense, everything, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments, message = refusals(dense, everything)[case]
    try:
        code = run(*arguments)
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(dense, tmp_path, capsys, monkeypatch):
    async def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Failed: No space left on device [os_error_code='28']")

    monkeypatch.setattr(EmptyArrays, "_open_and_write", full)
    out = tmp_path / "moe"
    arguments = ("--from", dense, "--to", out, "--module", "decoder", "--num-experts", 2)
    assert run("upcycle", *arguments) == 2
    line = capsys.readouterr().err
    assert line == f"error: {out}: cannot be written (No space left on device)\n"
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_refused(everything, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(everything, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"experts": {}}))
    assert run("prune", "--from", copy, "--keep", "0", "--to", tmp_path / "out") == 2
    assert "damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        (": [", "not valid YAML"),
        ("5", "holds no model settings"),
        ("", "holds no model settings"),
        ("model: {decoder: 5}", "decoder: "),
    ],
)
def test_bad_settings_are_named(dense, tmp_path, capsys, text, said):
    file = tmp_path / "bad.yaml"
    if text is not None:
        file.write_text(text)
    arguments = ("--module", "encoder", "--num-experts", 2, "--model", file)
    assert run("upcycle", "--from", dense, "--to", tmp_path / "x", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: ")
    assert said in line


@pytest.mark.parametrize("text", ["{", "[]", ": [", "5", ""])
@pytest.mark.parametrize("name", ["manifest.json", "model.yaml"])
def test_broken_small_files_are_one_line(everything, tmp_path, capsys, name, text):
    copy = tmp_path / "copy"
    shutil.copytree(everything, copy)
    (copy / name).write_text(text)
    assert run("list", copy) == convert("inspect", copy) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(f"error: {copy / name}: damaged")


def test_parts_are_compared_without_logits(everything, tmp_path, capsys):
    """Experts that were split off carry the settings of a whole model."""
    cut = tmp_path / "cut"
    assert run("split", "--from", everything, "--to", cut, "--experts", "0,1") == 0
    capsys.readouterr()
    assert convert("verify", cut / "expert_0", cut / "expert_1") == 0
    assert "logits: not compared" in capsys.readouterr().out


def test_a_name_stands_for_one_checkpoint(dense, other, tmp_path, capsys):
    """The one that all else comes from is called base: the manifest has one parent a name."""
    arguments = ("assemble", "--from", dense, "--module", "encoder", "--to", tmp_path / "moe")
    assert run(*arguments, "--expert", f"base={other}", "--expert", f"b={dense}") == 2
    assert f"--expert base={other}: base is {dense} already" in capsys.readouterr().err
    assert run(*arguments, "--expert", f"b={other}", "--expert", f"base={dense}") == 0
    assert read_manifest(tmp_path / "moe")["parents"] == {"base": str(dense), "b": str(other)}


def test_what_stages_left_is_compared_with_logits(dense, other, tmp_path, capsys):
    """Its settings stand in the run directory; a part of it that holds the embedding has none."""
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


def test_settings_can_be_named(dense, tmp_path, capsys):
    """A checkpoint outside its run directory does not know its model."""
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
