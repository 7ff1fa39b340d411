"""Requests -> prompts: where media stand, what is refused, and with which words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.generation.conftest import tokenizer_folder
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.generation.errors import GenerationError
from unimoe_jax.generation.prompt import make_prompt
from unimoe_jax.generation.request import (
    Media,
    Message,
    Request,
    Sampling,
    ask,
    request_of,
)

ALL = frozenset({"image", "video", "speech", "audio"})
TOKENIZER = Tokenizer.load(tokenizer_folder())
IMAGE, SPEECH, SOUND, VIDEO = (
    Media(kind, (f"{kind}.x",)) for kind in ("image", "speech", "audio", "video")
)


def shown(request: Request, accepts=ALL) -> str:
    """The prompt as text, media by their files."""
    prompt = make_prompt(request, "vicuna_turns", TOKENIZER, accepts)
    parts = [
        f"[{span.medium.file.paths[0]}]" if span.medium else TOKENIZER.decode(span.ids)
        for span in prompt.spans
    ]
    return "|".join(part.strip() for part in parts)


def test_media_come_first_in_the_originals_order():
    text = shown(ask("What?", [VIDEO, SPEECH, IMAGE, SOUND]))
    order = [part for part in text.split("|") if part.startswith("[")]
    assert order == ["[image.x]", "[speech.x]", "[audio.x]", "[video.x]"]
    assert text.endswith("What? ASSISTANT:")


def test_placeholders_decide():
    text = shown(ask("Hear <audio> then <audio> and see <image>.", [IMAGE, SOUND, SPEECH]))
    order = [part for part in text.split("|") if part.startswith("[")]
    assert order == ["[audio.x]", "[speech.x]", "[image.x]"]


def test_a_placeholder_without_files_is_text():
    assert "<image>" in shown(ask("What does <image> mean in HTML?"))


def test_slots_follow_the_prompt():
    prompt = make_prompt(
        ask("<image> <audio> <image>", [IMAGE, IMAGE, SOUND]), "vicuna_turns", TOKENIZER, ALL
    )
    stream = prompt.stream([2, 3, 2])
    assert stream.slot[stream.slot >= 0].tolist() == list(range(7))
    assert stream.modality[stream.slot >= 0].tolist() == [1, 1, 4, 4, 4, 1, 1]
    assert np.all(stream.modality[stream.slot < 0] == 0)


@pytest.mark.parametrize(
    ("request_", "pieces"),
    [
        (ask("<image> <image>", [IMAGE]), ["2 <image>", "1 file"]),
        (ask("  "), ["empty"]),
        (Request(()), ["at least one message"]),
        (Request((Message("assistant", "hi"),)), ["message 0", "assistant"]),
        (Request((Message("user", "a"), Message("assistant", "b"))), ["last message"]),
        (
            Request((Message("user", "a", (IMAGE,)), Message("assistant", "b"),
                     Message("user", "<image>"))),
            ["message 2", "1 <image>", "0 file"],
        ),
    ],
)  # fmt: skip
def test_bad_requests(request_: Request, pieces: list[str]):
    with pytest.raises(GenerationError) as error:
        make_prompt(request_, "vicuna_turns", TOKENIZER, ALL)
    for piece in pieces:
        assert piece in str(error.value)


def test_a_missing_encoder_is_named():
    with pytest.raises(GenerationError, match=r"audio\.x.*no encoder.*image"):
        make_prompt(ask("x", [SOUND]), "vicuna_turns", TOKENIZER, frozenset({"image"}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -1.0),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 1.5),
        ("seed", -1),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
    ],
)
def test_bad_sampling(name: str, value):
    with pytest.raises(GenerationError, match=f"{name} = "):
        Sampling(**{name: value}).checked()


def test_own_settings_win():
    defaults = Sampling(0.7, 0.9, 10, 0, 100)
    assert Sampling(temperature=0.0).over(defaults) == Sampling(0.0, 0.9, 10, 0, 100)
    assert Sampling().checked() == Sampling(0.0, 1.0, 50, 0, 1024)


def test_questions_as_json():
    root = Path("/data")
    content = {"id": 3, "prompt": "What?", "image": ["a.png", "b.png"], "temperature": 0.5}
    request = request_of(content, root, Sampling(max_new_tokens=7))
    assert request.sampling == Sampling(temperature=0.5, max_new_tokens=7)
    assert [m.paths for m in request.messages[0].media] == [("/data/a.png",), ("/data/b.png",)]
    talk = [{"role": "user", "text": "a", "video": [["1.png", "2.png"]]}]
    talk += [{"role": "assistant", "text": "b"}, {"role": "user", "text": "c"}]
    request = request_of({"messages": talk}, root, Sampling())
    assert [message.role for message in request.messages] == ["user", "assistant", "user"]
    assert request.messages[0].media == (Media("video", ("/data/1.png", "/data/2.png")),)


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "x", "imgae": "a.png"}', '{"prompt": 3}', '{"prompt": "x", "image": 3}',
     '{"messages": 1}', '{"messages": [{"role": "system", "text": "x"}]}', '{"image": "a.png"}'],
)  # fmt: skip
def test_bad_questions(line: str):
    with pytest.raises(GenerationError):
        request_of(json.loads(line), Path("."), Sampling())
