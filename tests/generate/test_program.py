"""Conversations, routing, the command line, and models that cannot be loaded."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.generate.conftest import write_checkpoint
from tests.models.tiny import decoder_config, model_config
from unimoe_jax.checkpoints.checksums import seal
from unimoe_jax.generate import __main__ as generate
from unimoe_jax.generate import loader
from unimoe_jax.generate.chat import Chat, run_chat
from unimoe_jax.generate.engine.settings import CheckedSampling, Sampling
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.found import Found
from unimoe_jax.generate.generation_config import generation_settings
from unimoe_jax.generate.request import Media
from unimoe_jax.generate.routing import report_lines, routing_report

SHORT = Sampling(max_new_tokens=5)


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
    printed = out.getvalue()
    assert printed.count("error: ") == 3
    assert "nowhere.png" in printed
    assert [message.text for message in chat.history[::2]] == ["Who are you?"]
    assert not chat.attached


def test_a_chat_keeps_its_history(model, files):
    chat = Chat(model, SHORT)
    first = "".join(chat.ask("Where is the fox?"))
    list(chat.ask("Why?"))
    assert [message.role for message in chat.history] == ["user", "assistant"] * 2
    assert chat.history[1].text == first
    with pytest.raises(GenerationError):
        list(chat.ask(" "))  # an empty question without attached files
    assert len(chat.history) == 4


def test_a_chat_expands_the_home_folder(model, files, monkeypatch):
    monkeypatch.setenv("HOME", str(files["a"].parent))
    chat, out = Chat(model, SHORT), io.StringIO()
    run_chat(chat, [f"/image ~/{files['a'].name}", "/image ~nobody-here/a.png"], out)
    assert chat.attached == [Media("image", (str(files["a"]),))]
    assert "error: no such file: ~nobody-here/a.png" in out.getvalue()


def test_a_chat_survives_bad_input(model, capsys):
    """A file name is too long, a question is no valid text, and a placeholder has no file."""
    chat, out = Chat(model, SHORT), io.StringIO()
    run_chat(chat, [f"/image /tmp/{'a' * 300}.png", "caf\udce9", "<image> fox", "/exit"], out)
    assert out.getvalue().count("error: ") == 2
    assert len(chat.history) == 2
    assert capsys.readouterr().err.count("note: the prompt names <image>") == 1


def test_bytes_that_are_no_text(monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    monkeypatch.setattr("sys.stdout", shown)
    generate.tolerate_bytes()
    line = next(typed)
    assert line == "caf\udce9\n"
    print(line, end="", flush=True)
    assert shown.buffer.getvalue() == b"caf\\udce9\n"


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
    status, stderr = run(
        capsys, "--model", checkpoint, "--image", files["cut.png"], "--prompt", "x", "--quiet"
    )
    assert status == 2
    assert "cut.png" in stderr
    assert stderr.count("error:") == 1


def test_sound_that_is_longer_than_its_header_says(model, files, tmp_path, monkeypatch):
    """The sound is refused as if its header had said so, and never cut."""
    import soundfile

    sound = Media("speech", (str(tmp_path / "long.wav"),))
    limit = model.config.speech.max_chunks
    soundfile.write(sound.paths[0], np.ones(16000 * (limit + 1), np.float32) / 9, 16000)
    monkeypatch.setattr(model.media.processors, "count", lambda file: (1, 1))
    with pytest.raises(GenerationError, match=f"{limit + 1} chunks .* this model takes {limit}"):
        model.generate([generate.ask("x", [sound], SHORT)])


def test_load_options_are_checked():
    """A wrong option is refused when it is given, not when a question is asked."""
    wrong = {"precision": "fp16", "template": "vicuna", "experts": "apart", "trace": {"expert"}}
    for name, value in wrong.items():
        with pytest.raises(GenerationError, match=f"{name} = .*; allowed: "):
            loader.LoadOptions(**{name: value})


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
        (["--prompt", "x", "--mesh", "tensor=2"], ["num_kv_heads = 1", "mesh.tensor = 2"]),
        (["--prompt", "x", "--mesh", "expert=0"], ["expert=0", "N from 1 up"]),
        (["--prompt", "x", "--mesh", "expert=-1"], ["--mesh expert=-1", "at most once"]),
        (["--prompt", "x", "--batch-size", "0"], ["--batch-size 0"]),
        (["--prompt", "x", "--top-k", "100000000000"], ["top_k = 1000", "2^31"]),
        (["--prompt", "caf\udce9"], ["character 4", "UTF-8"]),
        (["--prompt", "x", "--image", ""], ["image", "''"]),
        (["--prompt", "x", "--image", "a" * 300], ["too long", "aaa"]),
        ([], ["--prompt"]),
    ],
)
def test_bad_arguments(arguments, pieces, checkpoint, capsys):
    status, stderr = run(capsys, "--model", checkpoint, *arguments)
    assert status == 2
    assert stderr.startswith("error: ")
    for piece in pieces:
        assert piece in stderr


@pytest.mark.parametrize("flag", ["--show-routing", "--output"])
def test_output_paths_are_checked_before_the_model(flag, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "load", None)
    (tmp_path / "q.jsonl").write_text("")
    flags = ["--prompt", "x"] if flag == "--show-routing" else ["--input", tmp_path / "q.jsonl"]
    for place, piece in ((tmp_path / "no" / "x.json", "no such folder"), (tmp_path, "a folder")):
        status, stderr = run(capsys, "--model", "m", *flags, flag, place)
        assert status == 2
        assert stderr.startswith(f"error: {flag} {place}: ")
        assert piece in stderr
    monkeypatch.setattr(generate.os, "access", lambda place, mode: place != tmp_path)
    status, stderr = run(capsys, "--model", "m", *flags, flag, tmp_path / "x.json")
    assert status == 2
    assert stderr == f"error: {flag} {tmp_path}/x.json: cannot be written; name a file elsewhere\n"


def test_an_empty_folder_of_frames_is_named(model, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(GenerationError, match=f"{empty}: .*without images"):
        model.generate([generate.ask("x", [Media("video", (str(empty),))], SHORT)])


@pytest.mark.parametrize("requests", ["x", [None], None, generate.ask("x"), [generate.ask(None)]])
def test_requests_must_be_a_list_of_requests(model, requests):
    with pytest.raises(GenerationError, match=r"expected|must be a string"):
        model.generate(requests)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_batch_has_at_least_one_row(model, size):
    with pytest.raises(GenerationError, match=f"batch_size = {size}"):
        model.generate([generate.ask("x")], batch_size=size)
    with pytest.raises(GenerationError, match="batch_size"):
        next(model.answers([], size))


def test_resuming_with_another_model_is_refused(checkpoint, tmp_path, capsys):
    """The same command continues its file. A checkpoint with one other byte is another model."""
    source, target = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text('{"prompt": 1}\n')
    flags = ["--input", source, "--output", target]
    assert run(capsys, "--model", checkpoint, *flags)[0] == 0
    whole = target.read_bytes()
    assert run(capsys, "--model", checkpoint, *flags)[0] == 0
    other = copy_of(checkpoint, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"another": 1}))
    seal(other)
    status, stderr = run(capsys, "--model", other, *flags)
    assert status == 2
    assert f"error: {target}:1: answered with another model" in stderr
    assert target.read_bytes() == whole


def copy_of(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    return folder


def test_models_that_cannot_answer(checkpoint, config, tmp_path, capsys):
    def error_of(path: Path) -> str:
        status, text = run(capsys, "--model", path, "--prompt", "x")
        assert status == 2
        return text

    assert "no such folder" in error_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "convert import" in error_of(tmp_path / "empty")

    strange = copy_of(checkpoint, tmp_path / "strange")
    manifest = json.loads((strange / "manifest.json").read_text())
    (strange / "manifest.json").write_text(json.dumps(manifest | {"family": "clip"}))
    seal(strange)
    assert "no template is known for family 'clip'" in error_of(strange)

    damaged = copy_of(checkpoint, tmp_path / "damaged")
    (damaged / "model.yaml").write_text((damaged / "model.yaml").read_text() + "\n")
    assert "damaged" in error_of(damaged)

    larger = decoder_config(vocab_size=config.decoder.vocab_size, num_layers=5)
    missing = write_checkpoint(tmp_path / "missing", replace_decoder(config, larger))
    shutil.copyfile(checkpoint / "model.yaml", missing / "model.yaml")
    seal(missing)
    assert "needs" in error_of(missing) or "parameters" in error_of(missing)

    part = write_checkpoint(tmp_path / "part", model_config(decoder=config.decoder))
    shutil.copyfile(checkpoint / "model.yaml", part / "model.yaml")
    seal(part)
    assert "lacks" in error_of(part)


def replace_decoder(config, decoder):
    return config.model_copy(update={"decoder": decoder})


# -------------------------------------------------------------------------- generation_config


def settings(**content):
    """The settings of a checkpoint whose generation_config.json has this content."""

    class Tokenizer:
        eos_id = 2

    found = Found(Path("x"), None, Tokenizer, "vicuna_v1", content)
    return generation_settings(found)


def test_generation_config_is_followed():
    assert settings()[:2] == ((2,), Sampling(temperature=0.0))
    eos, sampling, notes = settings(
        do_sample=True, temperature=0.9, top_p=0.6, eos_token_id=[7, 8], max_new_tokens=30
    )
    assert eos == (7, 8)
    assert sampling.checked() == CheckedSampling(0.9, 0.6, 50, 0, 30)
    assert not notes
    # Without do_sample the other settings have no effect.
    assert settings(temperature=0.9)[1].checked().temperature == 0
    with pytest.raises(GenerationError, match="top_p = 3"):
        settings(do_sample=True, top_p=3)


def test_every_key_that_is_not_followed_gives_a_note():
    """This holds for unknown keys too, such as a misspelt one."""
    ignored = {
        "num_beams": 5,
        "min_p": 0.1,
        "stop_strings": ["."],
        "suppress_tokens": [7],
        "repetition_penalty": 1.2,
        "temprature": 0.3,
    }
    notes = settings(**ignored)[2]
    assert len(notes) == len(ignored)
    for key, value in ignored.items():
        assert f"generation_config.json: {key} = {value!r} is not followed" in notes
    silent = {"num_beams": 1, "repetition_penalty": 1, "min_new_tokens": 0, "bad_words_ids": []}
    silent |= {"_from_model_config": True, "bos_token_id": 1, "pad_token_id": 0, "use_cache": True}
    silent |= {"transformers_version": "4.31.0", "max_length": 4096, "suppress_tokens": None}
    assert not settings(**silent)[2]
    (note,) = settings(temperature=0.2, do_sample=False)[2]
    assert "temperature = 0.2 has no effect without do_sample" in note
    assert not settings(temperature=0.2, do_sample=True)[2]
    with pytest.raises(GenerationError, match=r"do_sample = 'false'; allowed"):
        settings(do_sample="false")


def test_defaults_of_the_model_are_used(model):
    warm = replace(model, defaults=Sampling(temperature=1.5, max_new_tokens=3))
    prepared = warm.prepare(generate.ask("x"))
    assert prepared.sampling.temperature == 1.5
    assert prepared.sampling.max_new_tokens == 3
