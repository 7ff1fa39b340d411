"""Upcycle, assemble, split and prune: which slices the new checkpoint has."""

from __future__ import annotations

import numpy as np
import pytest

from tests.experts.stages import CONNECTOR, ENCODER, EXPERTS, FFN, UNREAD, model_of, run
from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.checkpoints.manifest import read_manifest
from unimoe_jax.convert.plan import parameter_shapes


def test_upcycle_fills_the_model_that_it_describes(upcycled, dense):
    model, params, base = model_of(upcycled), load_final(upcycled), load_final(dense)
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


def test_routers_start_as_the_model_would_start_them(upcycled):
    params = load_final(upcycled)
    encoder = params["vision/encoder/layers/moe/router/linear/kernel"]
    assert np.abs(encoder).max() <= 8**-0.5 and np.abs(encoder).max() > 0.5 * 8**-0.5
    decoder = params["decoder/run_0/block_0/moe/router/linear/kernel"]
    assert 0.01 < decoder.std() < 0.03
    assert len({row.tobytes() for row in decoder}) == len(decoder), "every layer has another router"


def test_assemble_names_every_expert(dense, other, tmp_path, capsys):
    out = tmp_path / "moe"
    experts = ("--expert", f"new={other}", "--expert", f"old={dense}", "--expert", f"new={other}")
    arguments = ("assemble", "--from", dense, "--to", out, *experts, "--layers", "even")
    assert run(*arguments) == 0
    params, base, new = load_final(out), load_final(dense), load_final(other)
    assert list(read_manifest(out)["moe_layers"]) == [True, False, True]
    assert params[EXPERTS].shape[:2] == (1, 3)  # layer 0; layer 2 is a separate run of layers
    for expert, source in enumerate((new, base, new)):
        np.testing.assert_array_equal(params[EXPERTS][0, expert], source[FFN][0])
    assert {path: v.shape for path, v in params.items()} == parameter_shapes(model_of(out), [""])
    assert read_manifest(out)["experts"] == {"decoder": ["new", "old", "new"]}
    capsys.readouterr()
    assert run("list", out) == 0
    assert "decoder expert 1  from old" in capsys.readouterr().out


def test_a_name_means_one_checkpoint(dense, other, tmp_path, capsys):
    """The manifest lists one parent per name, and --from has the name base."""
    arguments = ("assemble", "--from", dense, "--module", "encoder", "--to", tmp_path / "moe")
    assert run(*arguments, "--expert", f"base={other}", "--expert", f"b={dense}") == 2
    assert f"--expert base={other}: base is {dense} already" in capsys.readouterr().err
    assert run(*arguments, "--expert", f"b={other}", "--expert", f"base={dense}") == 0
    assert read_manifest(tmp_path / "moe")["parents"] == {"base": str(dense), "b": str(other)}


@pytest.mark.parametrize("whole", [False, True])
def test_split_undoes_assemble(dense, other, tmp_path, whole):
    moe, cut = tmp_path / "moe", tmp_path / "cut"
    experts = ("--expert", f"a={other}", "--expert", f"b={dense}")
    assert run("assemble", "--from", dense, "--to", moe, *experts, "--layers", "0,1") == 0
    assert run("split", "--from", moe, "--to", cut, *(["--whole"] if whole else [])) == 0
    first, base, new = load_final(cut / "expert_0"), load_final(dense), load_final(other)
    np.testing.assert_array_equal(first[FFN][:2], new[FFN][:2])
    np.testing.assert_array_equal(first[FFN][2], base[FFN][2])  # layer 2 has always been dense
    assert set(first) == (set(base) if whole else {p for p in base if "/mlp/" in p and p[0] == "d"})
    second = load_final(cut / "expert_1")
    for path, value in second.items():
        np.testing.assert_array_equal(value, base[path])
    if not whole:  # experts that were split can be assembled again
        again = ("--expert", f"a={cut / 'expert_0'}", "--expert", f"b={cut / 'expert_1'}")
        out = tmp_path / "again"
        assert run("assemble", "--from", dense, "--to", out, *again, "--layers", "0,1") == 0
        for path, value in load_final(moe).items():
            np.testing.assert_array_equal(load_final(out)[path], value)


def test_prune_keeps_outputs_of_the_router(upcycled, tmp_path):
    out = tmp_path / "two"
    assert run("prune", "--from", upcycled, "--to", out, "--keep", "2,0") == 0
    before, after = load_final(upcycled), load_final(out)
    assert {path: v.shape for path, v in after.items()} == parameter_shapes(model_of(out), [""])
    assert model_of(out).decoder.moe.top_k == 2
    router = "vision/connector/moe/router/linear/kernel"
    np.testing.assert_array_equal(after[router], before[router][:, [2, 0]])
    np.testing.assert_array_equal(after[ENCODER], before[ENCODER][:, [2, 0]])
    one = tmp_path / "one"
    only = ("--keep", 1, "--module", "encoder")
    assert run("prune", "--from", upcycled, "--to", one, *only) == 0
    assert model_of(one).vision.encoder.moe.top_k == 1
    assert model_of(one).decoder.moe.num_experts == 3
