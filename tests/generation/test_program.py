"""The command line, files of questions, conversations and loading: what a user meets."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.generation.conftest import write_checkpoint
from tests.models.tiny import decoder_config, model_config
from unimoe_jax import generate
from unimoe_jax.checkpoint import seal
from unimoe_jax.generation import loader
from unimoe_jax.generation.batch_files import answer_file
from unimoe_jax.generation.chat import Chat, run_chat
from unimoe_jax.generation.errors import GenerationError
from unimoe_jax.generation.request import Media, Sampling
from unimoe_jax.generation.routing import report_lines, routing_report

SHORT = Sampling(max_new_tokens=5)


# ------------------------------------------------------------------------- files of questions


def questions(folder: Path, files: dict[str, Path]) -> Path:
    lines = [
        {"id": "text", "prompt": "Where is the fox?"},
        {"id": "image", "prompt": "What is this?", "image": str(files["a"])},
        {"id": "missing", "prompt": "What is this?", "image": "nowhere.png"},
        {"id": "unknown", "prompt": "x", "imgae": "a"},
        {"prompt": "Hot", "temperature": 1.2, "seed": 5},
        {"id": "sound", "prompt": "", "speech": str(files["short"])},
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not json\n")
    return path


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_questions(model, files, tmp_path):
    """Order kept, bad ones recorded; the same from where it broke off."""
    source, target = questions(tmp_path, files), tmp_path / "answers.jsonl"
    out = io.StringIO()
    assert answer_file(model, source, target, SHORT, 2, out) == (4, 3)
    found = answers(target)
    assert [line["id"] for line in found] == [
        "text", "image", "missing", "unknown", 5, "sound", 7
    ]  # fmt: skip
    assert [line["id"] for line in found if "error" in line] == ["missing", "unknown", 7]
    assert "nowhere.png" in found[2]["error"]
    assert "imgae" in found[3]["error"]
    assert all(line["tokens"] <= 5 for line in found if "tokens" in line)
    assert found[4]["sampling"]["temperature"] == 1.2
    assert "7/7" in out.getvalue()

    whole = target.read_text()
    lines = whole.splitlines(keepends=True)
    target.write_text("".join(lines[:2]) + lines[2][:9])  # broken off inside the third line
    assert answer_file(model, source, target, SHORT, 2, io.StringIO()) == (2, 3)
    assert target.read_text() == whole
    assert answer_file(model, source, target, SHORT, 2, io.StringIO()) == (0, 0)


def test_answers_to_other_questions_are_refused(model, files, tmp_path):
    source, target = questions(tmp_path, files), tmp_path / "answers.jsonl"
    target.write_text('{"id": 1, "question": "0000", "text": "x"}\n')
    with pytest.raises(GenerationError, match="another question"):
        answer_file(model, source, target, SHORT, 2, io.StringIO())


# ------------------------------------------------------------------------------ conversations


def test_chat(model, files):
    chat, out = Chat(model, SHORT), io.StringIO()
    lines = [
        f"/image {files['a']}",
        "What is this?",
        "And why?",
        "/image nowhere.png",
        "/audio",
        "/nonsense",
        "/reset",
        "Who are you?",
        "/exit",
        "never read",
    ]
    run_chat(chat, lines, out)
    said = out.getvalue()
    assert said.count("error: ") == 3
    assert "nowhere.png" in said
    assert [message.text for message in chat.history[::2]] == ["Who are you?"]
    assert not chat.attached


def test_chat_remembers(model, files):
    chat = Chat(model, SHORT)
    first = "".join(chat.ask("Where is the fox?"))
    list(chat.ask("Why?"))
    assert [message.role for message in chat.history] == ["user", "assistant"] * 2
    assert chat.history[1].text == first
    with pytest.raises(GenerationError):
        list(chat.ask("<image>" * 3 + "\0"[:0] + " " if chat.attached else " "))
    assert len(chat.history) == 4


# ------------------------------------------------------------------------------------ routing


def test_routing_report(model, mixed):
    (answer,) = model.generate([mixed[3]])
    report = routing_report(model, answer)
    assert report["layers"] == [0, 2]
    assert set(report["groups"]) == {"text", "video", "speech", "answer"}
    assert sum(g["tokens"] for g in report["groups"].values()) == len(report["tokens"])
    assert report["groups"]["answer"]["tokens"] == len(answer.tokens) - 1
    for group in report["groups"].values():
        np.testing.assert_allclose(np.sum(group["share"], axis=1), 1, atol=1e-5)
    first = report["tokens"][0]["experts"]
    assert len(first) == 2
    assert len(set(first[0])) == 2  # two different experts
    assert len(list(report_lines(report))) == 4 * (2 + 2)


# ---------------------------------------------------------------------------------- bad input


def run(capsys, *arguments: str) -> tuple[int, str]:
    status = generate.main([*map(str, arguments)])
    return status, capsys.readouterr().err


def hostile(folder: Path) -> dict[str, Path]:
    files = {name: folder / name for name in ("text.png", "cut.png", "wide.png", "nan.wav")}
    files["text.png"].write_text("no picture")
    whole = folder / "whole.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(whole)
    files["cut.png"].write_bytes(whole.read_bytes()[:40])
    Image.fromarray(np.zeros((1, 1000, 3), np.uint8)).save(files["wide.png"])
    import soundfile

    soundfile.write(files["nan.wav"], np.full(16000, np.nan), 16000, subtype="FLOAT")
    return files


def test_hostile_media(model, checkpoint, tmp_path, capsys):
    files = hostile(tmp_path)
    for name, path in files.items():
        kind = "audio" if name.endswith("wav") else "image"
        with pytest.raises(GenerationError, match=name):
            model.generate([generate.ask("x", [Media(kind, (str(path),))], SHORT)])
    status, said = run(
        capsys, "--model", checkpoint, "--image", files["cut.png"], "--prompt", "x", "--quiet"
    )
    assert status == 2
    assert "cut.png" in said
    assert said.count("error:") == 1


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["--prompt", "x", "--temperature", "nan"], ["temperature = nan"]),
        (["--prompt", "x", "--top-p", "0"], ["top_p = 0"]),
        (["--prompt", "<image> <image>", "--image", "a.png"], ["2 <image>", "1 file"]),
        (["--prompt", "x", "--image", "nowhere.png"], ["nowhere.png"]),
        (["--prompt", "fox " * 3000], ["positions", "4096", "shorten"]),
        (["--prompt", "x", "--max-new-tokens", "5000"], ["4096", "at most"]),
        (["--prompt", "x", "--chat"], ["--chat", "--prompt"]),
        (["--input", "q.jsonl"], ["--output"]),
        (["--input", "nowhere.jsonl", "--output", "a.jsonl"], ["nowhere.jsonl"]),
        (["--prompt", "x", "--mesh", "expertt=4"], ["expertt=4", "axes"]),
        (["--prompt", "x", "--mesh", "expert=3"], ["mesh.expert=3", "devices"]),
        (["--prompt", "x", "--batch-size", "0"], ["--batch-size 0"]),
        ([], ["--prompt"]),
    ],
)
def test_bad_arguments(arguments, pieces, checkpoint, capsys):
    status, said = run(capsys, "--model", checkpoint, *arguments)
    assert status == 2
    assert said.startswith("error: ")
    for piece in pieces:
        assert piece in said


def copy_of(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    return folder


def test_models_that_cannot_answer(checkpoint, config, tmp_path, capsys):
    def said(path: Path) -> str:
        status, text = run(capsys, "--model", path, "--prompt", "x")
        assert status == 2
        return text

    assert "no such folder" in said(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "convert import" in said(tmp_path / "empty")

    strange = copy_of(checkpoint, tmp_path / "strange")
    manifest = json.loads((strange / "manifest.json").read_text())
    (strange / "manifest.json").write_text(json.dumps(manifest | {"family": "clip"}))
    seal(strange)
    assert "no template is known for family 'clip'" in said(strange)

    damaged = copy_of(checkpoint, tmp_path / "damaged")
    (damaged / "model.yaml").write_text((damaged / "model.yaml").read_text() + "\n")
    assert "damaged" in said(damaged)

    larger = decoder_config(vocab_size=config.decoder.vocab_size, num_layers=5)
    missing = write_checkpoint(tmp_path / "missing", replace_decoder(config, larger))
    shutil.copyfile(checkpoint / "model.yaml", missing / "model.yaml")
    seal(missing)
    assert "needs" in said(missing) or "parameters" in said(missing)

    part = write_checkpoint(tmp_path / "part", model_config(decoder=config.decoder))
    shutil.copyfile(checkpoint / "model.yaml", part / "model.yaml")
    seal(part)
    assert "lacks" in said(part)


def replace_decoder(config, decoder):
    return config.model_copy(update={"decoder": decoder})


# -------------------------------------------------------------------------- generation_config


def settings(**given):
    class Tokenizer:
        eos_id = 2

    found = loader.Found(Path("x"), None, Tokenizer, "vicuna_v1", given)
    return loader.generation_settings(found)


def test_generation_config_is_honoured():
    assert settings()[:2] == ((2,), Sampling(temperature=0.0))
    eos, sampling, notes = settings(
        do_sample=True, temperature=0.9, top_p=0.6, eos_token_id=[7, 8], max_new_tokens=30
    )
    assert eos == (7, 8)
    assert sampling.checked() == Sampling(0.9, 0.6, 50, 0, 30)
    assert not notes
    # Without do_sample the other settings say nothing.
    assert settings(temperature=0.9)[1].checked().temperature == 0
    assert "num_beams = 5" in settings(num_beams=5)[2][0]
    with pytest.raises(GenerationError, match="top_p = 3"):
        settings(do_sample=True, top_p=3)


def test_defaults_of_the_model_hold(model):
    warm = replace(model, defaults=Sampling(temperature=1.5, max_new_tokens=3))
    prepared = warm.prepare(generate.ask("x"))
    assert prepared.sampling.temperature == 1.5
    assert prepared.sampling.max_new_tokens == 3
