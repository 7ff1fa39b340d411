"""Bad input is refused in one line and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.experts.stages import convert, run
from unimoe_jax.convert.writer import EmptyArrays


def refusals(dense: Path, moe: Path) -> dict[str, tuple[tuple, str]]:
    """Case -> arguments, and a part of the error message."""
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
    case, dense, upcycled, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments, message = refusals(dense, upcycled)[case]
    try:
        code = run(*arguments)
    except SystemExit as stopped:  # raised by argparse
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


def test_a_damaged_checkpoint_is_refused(upcycled, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(upcycled, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"experts": {}}))
    assert run("prune", "--from", copy, "--keep", "0", "--to", tmp_path / "out") == 2
    assert "damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        (": [", "not valid YAML"),
        ("5", "holds no model settings"),
        ("", "holds no model settings"),
        ("model: {decoder: 5}", "decoder: "),
    ],
)
def test_bad_settings_are_named(dense, tmp_path, capsys, text, message):
    file = tmp_path / "bad.yaml"
    if text is not None:
        file.write_text(text)
    arguments = ("--module", "encoder", "--num-experts", 2, "--model", file)
    assert run("upcycle", "--from", dense, "--to", tmp_path / "x", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: ")
    assert message in line


@pytest.mark.parametrize("text", ["{", "[]", ": [", "5", ""])
@pytest.mark.parametrize("name", ["manifest.json", "model.yaml"])
def test_broken_small_files_are_one_line(upcycled, tmp_path, capsys, name, text):
    copy = tmp_path / "copy"
    shutil.copytree(upcycled, copy)
    (copy / name).write_text(text)
    assert run("list", copy) == convert("inspect", copy) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(f"error: {copy / name}: damaged")
