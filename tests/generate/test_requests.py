"""Requests -> prompts: places of media, and the messages for requests that are refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.generate.conftest import tokenizer_folder
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.generate.engine.settings import CheckedSampling, Sampling
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.prompt import make_prompt, unanswered_tags
from unimoe_jax.generate.request import Media, Message, Request, ask, request_of

ALL = frozenset({"image", "video", "speech", "audio"})
TOKENIZER = Tokenizer.load(tokenizer_folder())
IMAGE, SPEECH, SOUND, VIDEO = (
    Media(kind, (f"{kind}.x",)) for kind in ("image", "speech", "audio", "video")
)


def shown(request: Request, accepts=ALL) -> str:
    """The prompt as text, with file names in place of media."""
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


def test_placeholders_decide_the_order_of_media():
    text = shown(ask("Hear <audio> then <audio> and see <image>.", [IMAGE, SOUND, SPEECH]))
    order = [part for part in text.split("|") if part.startswith("[")]
    assert order == ["[audio.x]", "[speech.x]", "[image.x]"]


def test_a_placeholder_without_files_is_text():
    assert "<image>" in shown(ask("What does <image> mean in HTML?"))


def test_a_placeholder_that_was_text_stays_text():
    """A later file does not change that: the turn was answered without it."""
    turns = (
        Message("user", "What is <image> in HTML?"),
        Message("assistant", "A tag."),
        Message("user", "And this?", (IMAGE,)),
        Message("assistant", "<image>"),
        Message("user", "<image> or <audio>?", (SOUND, Media("image", ("b.x",)))),
    )
    text = shown(Request(turns))
    order = [part for part in text.split("|") if part.startswith("[")]
    assert order == ["[image.x]", "[b.x]", "[audio.x]"]
    assert text.count("<image>") == 2
    prompt = make_prompt(Request(turns), "vicuna_turns", TOKENIZER, ALL)
    stream = prompt.stream([2, 1, 3])
    assert stream.modality[stream.slot >= 0].tolist() == [1, 1, 1, 4, 4, 4]
    assert stream.slot[stream.slot >= 0].tolist() == list(range(6))


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
        ("temperature", 1e39),  # infinite in float32
        pytest.param("temperature", 10**400, id="too large for any float"),
        ("top_k", 2**31),  # the arrays hold int32
        ("max_new_tokens", 2**31),
        ("seed", 2**32),
        ("seed", -1),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
    ],
)
def test_bad_sampling(name: str, value):
    with pytest.raises(GenerationError, match=f"{name} = "):
        Sampling(**{name: value}).checked()


def test_numbers_of_numpy_become_plain():
    """Checked settings are written as JSON, which only takes numbers of Python."""
    given = Sampling(np.float32(0.5), np.float64(0.25), np.int32(7), np.uint32(2**31), np.int64(3))
    checked = given.checked()
    assert checked == CheckedSampling(0.5, 0.25, 7, 2**31, 3)
    assert json.loads(json.dumps(asdict(checked))) == asdict(checked)


@pytest.mark.parametrize("value", [np.int64(-1), np.bool_(True), np.float32(1.0), np.array([1])])
def test_bad_numbers_of_numpy(value):
    with pytest.raises(GenerationError, match="top_k = "):
        Sampling(top_k=value).checked()


def test_settings_of_a_request_come_before_defaults():
    defaults = Sampling(0.7, 0.9, 10, 0, 100)
    assert Sampling(temperature=0.0).over(defaults) == Sampling(0.0, 0.9, 10, 0, 100)
    assert Sampling().checked() == CheckedSampling(0.0, 1.0, 50, 0, 1024)


def test_questions_as_json():
    root = Path("/data")
    content = {"id": 3, "prompt": "What?", "image": ["a.png", "b.png"], "temperature": 0.5}
    request = request_of(content, root, Sampling(max_new_tokens=7))
    assert request.sampling == Sampling(temperature=0.5, max_new_tokens=7)
    assert [m.paths for m in request.messages[0].media] == [("/data/a.png",), ("/data/b.png",)]
    turns = [
        {"role": "user", "text": "a", "video": [["1.png", "2.png"]]},
        {"role": "assistant", "text": "b"},
        {"role": "user", "text": "c"},
    ]
    request = request_of({"messages": turns}, root, Sampling())
    assert [message.role for message in request.messages] == ["user", "assistant", "user"]
    assert request.messages[0].media == (Media("video", ("/data/1.png", "/data/2.png")),)


def test_a_list_of_images_is_one_video():
    """The training data give frames like this. A list of video files is several videos."""

    def videos(value) -> list[tuple[str, ...]]:
        request = request_of({"prompt": "x", "video": value}, Path("/d"), Sampling())
        return [medium.paths for medium in request.messages[0].media]

    assert videos(["1.png", "2.JPG"]) == [("/d/1.png", "/d/2.JPG")]
    assert videos([["1.png"], ["2.png", "3.png"]]) == [("/d/1.png",), ("/d/2.png", "/d/3.png")]
    assert videos(["a.mp4", "b.mp4"]) == [("/d/a.mp4",), ("/d/b.mp4",)]
    assert videos(["1.png", "b.mp4"]) == [("/d/1.png",), ("/d/b.mp4",)]
    assert videos([]) == []


def test_a_question_takes_other_settings_from_the_command_line():
    """This includes the seed, although the seed of a new `Sampling` is 0 and not None."""
    defaults = Sampling(0.7, seed=5)
    for content, seed in (({}, 5), ({"seed": None}, 5), ({"seed": 0}, 0)):
        request = request_of({"prompt": "x", **content}, Path("."), defaults)
        assert request.sampling == Sampling(0.7, seed=seed)


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "x", "imgae": "a.png"}', '{"prompt": 3}', '{"prompt": "x", "image": 3}',
     '{"prompt": "x", "text": "y"}',
     '{"messages": 1}', '{"messages": [{"role": "system", "text": "x"}]}', '{"image": "a.png"}'],
)  # fmt: skip
def test_bad_questions(line: str):
    with pytest.raises(GenerationError):
        request_of(json.loads(line), Path("."), Sampling())


@pytest.mark.parametrize(
    ("content", "pieces"),
    [
        ({"messages": [{"role": "user", "text": "x"}], "prompt": "y"}, ["messages", "prompt"]),
        ({"messages": [{"role": "user", "text": "x"}], "image": "a.png"}, ["messages", "image"]),
        (
            {"messages": [{"role": "user", "text": "x", "imgae": "a.png"}]},
            ["message 0", "imgae", "image"],
        ),
        (
            {"messages": [{"role": "user", "text": "x", "seed": 1}]},
            ["message 0", "seed", "beside messages"],
        ),
        ({"prompt": "x", "voice": "a.wav"}, ["voice", "allowed: id, ", " speech, audio, temper"]),
        ({"prompt": "x", "image": [""]}, ["image", "''"]),
        ({"prompt": "x", "video": [["a.png", ""]]}, ["video", "''"]),
    ],
)
def test_keys_that_would_be_ignored_are_refused(content, pieces):
    with pytest.raises(GenerationError) as error:
        request_of(content, Path("/data"), Sampling())
    assert all(piece in str(error.value) for piece in pieces)


@pytest.mark.parametrize(
    ("request_", "piece"),
    [
        (ask("a\ud800b"), "character 2"),
        (ask("caf\udce9"), "UTF-8"),
        (ask(None), "message 0: the text must be a string, not None"),
        (ask("x", ["a.png"]), "message 0: expected Media"),
        (ask("x", IMAGE), "message 0: media: expected a tuple, got Media"),
        (Request((Message("user", "x", None),)), "message 0: media: expected a tuple, got None"),
        (Request(None), "messages: expected a tuple, got None"),
        (Request(Message("user", "x")), "messages: expected a tuple, got Message"),
        (ask("x", sampling={"seed": 1}), "expected a Sampling"),
        (Request(("x",)), "message 0: expected a Message"),
        (Request((Message("user", "a"), Message("assistant", "\udfff"))), "message 1"),
    ],
)
def test_requests_of_wrong_types_or_text(request_: Request, piece: str):
    with pytest.raises(GenerationError, match=piece):
        request_.checked()


def test_paths_of_media():
    for name in ("v.mp4", Path("v.mp4")):
        with pytest.raises(GenerationError, match=r"\('v.mp4',\)"):
            Media("video", name)
    for paths in (None, (3,), (None,)):
        with pytest.raises(GenerationError, match="image: expected a tuple of paths"):
            Media("image", paths)
    assert Media("video", [Path("a.png"), "b.png"]) == Media("video", ("a.png", "b.png"))


@pytest.mark.parametrize(
    ("text", "media", "named"),
    [
        ("<image> hello", [], "<image> but no image was"),
        ("<audio> <image>", [IMAGE], "<audio> but no speech or audio was"),
        ("<image> hello", [IMAGE], None),
        ("hello", [], None),
    ],
)
def test_tags_without_files_are_noted(text, media, named):
    note = unanswered_tags(ask(text, media))
    assert (named in note) if named else note is None
