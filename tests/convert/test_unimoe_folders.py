"""Uni-MoE in its original files: experts by rank, router adapters, and rounding of the loaders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml

from tests.convert import unimoe_folders
from tests.convert.unimoe_folders import FILE_OF_EXPERT, MLP, OWN_RANK
from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.checkpoints.manifest import read_manifest
from unimoe_jax.convert.__main__ import main
from unimoe_jax.convert.entry import Rounding
from unimoe_jax.convert.tables import unimoe
from unimoe_jax.nn.attention.rope import rope_tables

SCALE = 2.0  # PEFT: lora_alpha / r of the folders
PEFT = "base_model.model."
MOE = "decoder/run_0/block_0/moe"


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def imported(root: Path, name: str, *options: str) -> dict[str, np.ndarray]:
    assert run("import", "--from", root, "--to", root.parent / name, *options) == 0
    return load_final(root.parent / name)


def adapter(tensors: Mapping[str, np.ndarray], module: str) -> np.ndarray:
    """B A in float32 without its scale, [out, in] like weights of torch."""
    a, b = (tensors[f"{PEFT}{module}.lora_{part}.weight"] for part in "AB")
    return b.astype(np.float32) @ a.astype(np.float32)


# -------------------------------------------------------------------------------- sparse 8e


@pytest.mark.parametrize("ranks", [8, 4])
def test_sparse_8e_puts_every_tensor_in_its_place(tmp_path: Path, ranks: int):
    files = unimoe_folders.write(tmp_path / "in", experts=8, ranks=ranks)
    params = imported(tmp_path / "in", "out")
    for place, layer in enumerate((0, 2)):
        top = f"model.layers.{layer}.mlp"
        gate = files["tuned/mlp_gates"][f"{top}.deepspeed_moe.gate.wg.weight"]
        np.testing.assert_array_equal(params[f"{MOE}/router/linear/kernel"][place], gate.T)
        for expert, file in enumerate(FILE_OF_EXPERT):
            rank, slot = divmod(expert, 8 // ranks)
            own = files[f"tuned/{rank}_mlp_experts"]
            for part in MLP:
                at = f"{MOE}/experts/{part}"
                kernel = files[f"experts/{file}"][f"{top}.{part}.weight"]
                np.testing.assert_array_equal(params[f"{at}/kernel"][place, expert], kernel.T)
                for half in "AB":
                    name = f"deepspeed_moe.experts.deepspeed_experts.{slot}.{part}_lora_{half}"
                    weight = own[f"{top}.{name}.weight"]
                    found = params[f"{at}/lora_{half.lower()}"][place, expert]
                    np.testing.assert_array_equal(found, weight.T)
    for place, layer in enumerate((1, 3)):
        for part in MLP:
            at = f"decoder/run_0/block_1/mlp/{part}"
            for end, leaf in ((".weight", "kernel"), ("_lora_A.weight", "lora_a")):
                weight = files["base/model"][f"model.layers.{layer}.mlp.{part}{end}"]
                np.testing.assert_array_equal(params[f"{at}/{leaf}"][place], weight.T)
    base, module = files["base/model"], "model.layers.1.self_attn.q_proj"
    merged = base[f"{module}.weight"] + SCALE * adapter(files["tuned/adapter_model"], module)
    found = params["decoder/run_0/block_1/attention/q_proj/kernel"][0]
    np.testing.assert_allclose(found, merged.T, rtol=1e-6, atol=1e-6)


def test_sparse_8e_config_and_reasons(tmp_path: Path):
    unimoe_folders.write(tmp_path / "in", experts=8)
    imported(tmp_path / "in", "out")
    model = yaml.safe_load((tmp_path / "out/model.yaml").read_text())["model"]
    assert model["decoder"]["moe"]["layers"] == "even"
    own = [rule for rule in model["lora"] if "experts" in rule["match"]]
    assert [(rule["rank"], rule["alpha"]) for rule in own] == [(OWN_RANK, 6.0)]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["family"] == "unimoe-8e"
    unused = manifest["unused"]
    lost = f"peft:{PEFT}model.layers.1.mlp.gate_proj_lora_A.lora_B.weight"
    assert "loses" in unused[lost]
    assert "dense" in unused["mlp3:model.layers.1.mlp.up_proj.weight"]
    assert "own experts" in unused["base:model.layers.0.mlp.gate.weight"]


@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("lora", ["merge", "keep"])
def test_there_and_back_again(tmp_path: Path, experts: int, lora: str):
    unimoe_folders.write(tmp_path / "in", experts)
    first = imported(tmp_path / "in", "a", "--lora", lora)
    out = tmp_path / "out"
    assert run("export", "--from", tmp_path / "a", "--to", out, "--format", "unimoe") == 0
    again = imported(out, "b", "--lora", lora)
    assert set(first) == set(again)
    for path, value in first.items():
        assert value.dtype == again[path].dtype
        assert value.tobytes() == again[path].tobytes(), path


def test_an_import_verifies_against_its_sources(tmp_path: Path, capsys):
    """The folders are read as the import read them: adapters merged, the same rounding."""
    unimoe_folders.write(tmp_path / "in", experts=4)
    imported(tmp_path / "in", "out", "--numerics", "released")
    assert run("verify", tmp_path / "in", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "logits: largest difference 0, KL 0, top-5 agreement 100.0%" in printed


def test_active_parameters(tmp_path: Path, capsys):
    unimoe_folders.write(tmp_path / "in", experts=8)
    params = imported(tmp_path / "in", "out")
    capsys.readouterr()
    assert run("inspect", tmp_path / "out") == 0
    idle = sum(value.size for path, value in params.items() if "/moe/experts/" in path) * 6 // 8
    total = sum(value.size for value in params.values())
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"total {total:,} parameters" in last
    assert last.endswith(f"active per token {total - idle:,}")


# ---------------------------------------------------------------------------------- routers


def test_router_adapters_are_kept_with_the_other_adapters(tmp_path: Path):
    files = unimoe_folders.write(tmp_path / "in", experts=4)
    params = imported(tmp_path / "in", "out", "--lora", "keep")
    gate = "model.layers.2.mlp.gate"
    router = f"{MOE}/router/linear"
    trained = files["tuned/mlp_gates"][f"{gate}.weight"]
    np.testing.assert_array_equal(params[f"{router}/kernel"][1], trained.T)
    for part in "AB":
        weight = files["tuned/adapter_model"][f"{PEFT}{gate}.lora_{part}.weight"]
        np.testing.assert_array_equal(params[f"{router}/lora_{part.lower()}"][1], weight.T)
    assert "router adapters: take part, as in training" in read_manifest(tmp_path / "out")["notes"]


def test_router_adapters_are_lost_by_default_as_in_released_inference(tmp_path: Path):
    files = unimoe_folders.write(tmp_path / "in", experts=4)
    gate = "model.layers.2.mlp.gate"
    trained = files["tuned/mlp_gates"][f"{gate}.weight"]
    router = f"{MOE}/router/linear/kernel"
    for options in ((), ("--lora", "keep", "--router-lora", "override")):
        params = imported(tmp_path / "in", f"lost{len(options)}", *options)
        np.testing.assert_array_equal(params[router][1], trained.T)
        assert f"{MOE}/router/linear/lora_a" not in params
    params = imported(tmp_path / "in", "merged", "--router-lora", "merge")
    merged = trained + SCALE * adapter(files["tuned/adapter_model"], gate)
    np.testing.assert_allclose(params[router][1], merged.T, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------- rounding


def test_released_numerics_of_four_experts(tmp_path: Path):
    files = unimoe_folders.write(tmp_path / "in", experts=4)
    params = imported(tmp_path / "in", "out", "--numerics", "released")
    assert {value.dtype.name for value in params.values()} == {"bfloat16"}
    base, half = files["base/model"], np.float16

    def last(value: np.ndarray) -> np.ndarray:
        return value.astype(half).astype(ml_dtypes.bfloat16)

    module = "model.layers.2.mlp.experts.1.up_proj"
    update = SCALE * adapter(files["tuned/adapter_model"], module)
    merged = (base[f"{module}.weight"].astype(half).astype(np.float32) + update).astype(half)
    found = params[f"{MOE}/experts/up_proj/kernel"][1, 1]
    np.testing.assert_array_equal(found, last(merged).T)
    gate = files["tuned/mlp_gates"]["model.layers.2.mlp.gate.weight"]
    np.testing.assert_array_equal(params[f"{MOE}/router/linear/kernel"][1], last(gate).T)
    scale = files["clip/model"]["vision_model.pre_layrnorm.weight"]
    np.testing.assert_array_equal(params["vision/encoder/pre_norm/scale"], last(scale))
    model = yaml.safe_load((tmp_path / "out/model.yaml").read_text())["model"]
    assert model["decoder"]["rope_table_dtype"] == "float16_bfloat16"


def test_released_numerics_of_8e_merge_before_they_round(tmp_path: Path):
    files = unimoe_folders.write(tmp_path / "in", experts=8)
    params = imported(tmp_path / "in", "out", "--numerics", "released")
    module = "model.layers.1.self_attn.v_proj"
    update = SCALE * adapter(files["tuned/adapter_model"], module)
    merged = files["base/model"][f"{module}.weight"] + update
    found = params["decoder/run_0/block_1/attention/v_proj/kernel"][0]
    np.testing.assert_array_equal(found, merged.astype(np.float16).astype(ml_dtypes.bfloat16).T)


def test_numerics_that_exclude_other_choices(tmp_path: Path, capsys):
    unimoe_folders.write(tmp_path / "in", experts=4)
    start = (
        "import",
        "--from",
        tmp_path / "in",
        "--to",
        tmp_path / "out",
        "--numerics",
        "released",
    )
    for more, words in (
        (("--lora", "keep"), "needs --lora merge"),
        (("--dtype", "float32"), "exclude each other"),
    ):
        assert run(*start, *more) == 2
        assert words in capsys.readouterr().err
    encoder = ("import", "--from", tmp_path / "in/clip", "--to", tmp_path / "out")
    assert run(*encoder, "--numerics", "released") == 2
    assert "Uni-MoE only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_released_audio_ends_in_float32():
    assert unimoe.rounding(False, "audio") == Rounding("float16", ("float16", "float32"), "float16")


@pytest.mark.parametrize("chain", ["float16", "float16_bfloat16"])
def test_rope_tables_are_rounded_inside_a_program(chain: str):
    """A compiler that keeps more digits than the dtype has would undo the rounding."""
    position = jnp.arange(512)[None]
    rounded = jax.jit(lambda p: rope_tables(p, 16, 1e4, chain))(position)
    for exact, table in zip(rope_tables(position, 16, 1e4), rounded, strict=True):
        found = np.asarray(table)
        for dtype in chain.split("_"):
            kept = found.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)
            np.testing.assert_array_equal(kept, found)
        np.testing.assert_allclose(found, np.asarray(exact), rtol=2**-7, atol=1e-4)
