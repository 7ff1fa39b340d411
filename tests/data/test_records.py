"""Every fault that a record can have is found, named and located."""

from __future__ import annotations

import json
import os

import pytest

from tests.data.helpers import talk
from unimoe_jax.data.conversation import Medium, messages
from unimoe_jax.data.record_files import RecordFile
from unimoe_jax.data.records import RecordReader
from unimoe_jax.data.tally import BadSample, Event, Tally, TooManyBadSamples

ALL = frozenset({"image", "video", "speech", "audio"})


def reader(path, root=None, voice="speech", accepts=ALL) -> RecordReader:
    return RecordReader("test", RecordFile(path), root or path.parent, voice, accepts)


def turns(*values) -> dict:
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "malformed_record"),
        ({"conversations": []}, "malformed_record"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "malformed_record"),
        ({"conversations": [{"from": "human", "value": 3}]}, "malformed_record"),
        (turns("q \ud800", "a"), "lone_surrogate"),
        (turns("q", "a \udc00b"), "lone_surrogate"),
        (talk("<image>", image="\ud800.png"), "lone_surrogate"),
        (turns("only a question"), "roles"),
        (turns("q", "a", "q"), "roles"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "roles"),
        ({"conversations": [{"from": "human", "value": "x"}] * 2}, "roles"),
        (talk(answer="  "), "empty_answer"),
        (talk("no placeholder", image="a.png"), "placeholder_count"),
        (talk("<image> <image>", image="a.png"), "placeholder_count"),
        (talk("<audio>", voice=["a.wav", "a.wav"]), "placeholder_count"),
        (talk("<image>", image="b.png"), "missing_file"),
        (talk("<image>", image="../secret"), "outside_root"),
        (talk("<image>", image="/etc/passwd"), "outside_root"),
        (talk("<image>", image="link.png"), "outside_root"),
        (talk("<image>", image="a\0.png"), "outside_root"),
        (talk("<image>", image={"path": "a.png"}), "malformed_record"),
        (talk("<audio>", voice="a.wav", voice_modality="music"), "voice_modality"),
        (talk("<audio>", voice="a.wav", voice_modality=["audio", "audio"]), "voice_modality"),
        ([1, 2], "malformed_json"),
    ],
)
def test_bad_records(folder, record, reason):
    folder.image("a.png")
    folder.sound("a.wav")
    (folder.root.parent / "secret").write_text("x")
    os.symlink(folder.root.parent / "secret", folder.root / "link.png")
    for lines in (True, False):
        source = reader(folder.write("data.json", [record], lines))
        with pytest.raises(BadSample) as caught:
            source.record(0)
        assert caught.value.reason == reason, caught.value.message


def test_frames_of_a_folder_stay_in_the_root(folder, monkeypatch):
    (folder.root / "clip").mkdir()
    folder.image("clip/0.png")
    os.symlink(folder.root / "clip" / "0.png", folder.root / "clip" / "1.png")
    source = reader(folder.write("data.json", [talk("<video>", video="clip")]))
    (file,) = source.record(0).media["<video>"]
    assert file.paths == (str(folder.root / "clip"),)
    (folder.root.parent / "secret.png").write_bytes((folder.root / "clip/0.png").read_bytes())
    os.symlink(folder.root.parent / "secret.png", folder.root / "clip" / "2.png")
    message = r"clip/2.png' is outside the data root .*, it leads to .*secret.png; set the .*`root`"
    with pytest.raises(BadSample, match=message) as caught:
        source.record(0)
    assert caught.value.reason == "outside_root"

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(BadSample, match=r"clip: Permission denied") as caught:
        source.record(0)
    assert caught.value.reason == "unreadable_video"


def test_open_voice_modality_and_missing_encoder(folder):
    folder.sound("a.wav")
    path = folder.write("data.json", [talk("<audio>", voice="a.wav")])
    with pytest.raises(BadSample, match="speech and audio"):
        reader(path, voice=None).record(0)
    with pytest.raises(BadSample, match="no encoder for speech"):
        reader(path, accepts=frozenset({"image"})).record(0)
    (file,) = reader(path, voice="audio").record(0).media["<audio>"]
    assert file.modality == "audio"


def test_media_in_all_their_forms(folder):
    frames = [folder.image(f"f{i}.png") for i in range(3)]
    folder.sound("a.wav")
    path = folder.write(
        "data.json",
        [
            talk("<image><image>", image=["f0.png", "f1.png"]),
            talk("<video>", video=frames),
            talk("<video><video>", video=[frames, frames[:2]]),
            talk("<video>", video="f0.png"),
            talk("<audio><audio>", voice=["a.wav", "a.wav"], voice_modality=["speech", "audio"]),
            talk("<image>", image=str(folder.root / "f0.png")),
        ],
    )
    records = [reader(path).record(i) for i in range(6)]
    assert [len(f.paths) for f in records[0].media["<image>"]] == [1, 1]
    assert [len(f.paths) for f in records[1].media["<video>"]] == [3]
    assert [len(f.paths) for f in records[2].media["<video>"]] == [3, 2]
    assert [f.modality for f in records[4].media["<audio>"]] == ["speech", "audio"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (talk("<image>", images=["a.png"]), "<image> without `image`; rename `images` to it"),
        (talk("<audio>", speech="a.wav"), "<audio> without `voice`; rename `speech` to it"),
        (talk("<video><video>", video=["a.png"] * 2), r"2 <video> for 1 .*; paths in one list are"),
    ],
)
def test_messages_about_media_in_another_form_name_the_right_form(folder, record, message):
    folder.image("a.png")
    source = reader(folder.write("data.json", [record, talk("x", audio="none", images=3)]))
    with pytest.raises(BadSample, match=message):
        source.record(0)
    assert source.record(1).media == {}  # the text has no placeholders for them


def test_undeclared_placeholders_and_answers_are_text(folder):
    folder.image("a.png")
    talks = [
        talk("what is <audio> and <video> or </s>?", "an <image> of </s>"),
        talk("<image> or <audio>?", "<image><image>", image="a.png"),
    ]
    source = reader(folder.write("data.json", talks))
    plain, pictured = (source.record(i) for i in range(2))
    assert [m.parts for m in messages(plain.turns, plain.media)] == [
        ("what is <audio> and <video> or </s>?",),
        ("an <image> of </s>",),
    ]
    human, gpt = messages(pictured.turns, pictured.media)
    assert isinstance(human.parts[0], Medium)
    assert human.parts[1:] == (" or <audio>?",)
    assert gpt.parts == ("<image><image>",)


def test_leading_answers_are_dropped(folder):
    record = {"conversations": [{"from": "gpt", "value": "Hi."}, *talk()["conversations"]]}
    assert len(reader(folder.write("d.json", [record])).record(0).turns) == 2


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_lines_of_a_pretty_printed_list(tmp_path, bom):
    records = [talk(f"ü☃ {i}", id=str(i)) for i in range(4)]
    path = tmp_path / "d.json"
    text = json.dumps(records, indent=2, ensure_ascii=False)
    path.write_bytes(bom + text.encode())
    file = RecordFile(path)
    assert [file.read(i) for i in range(4)] == records
    starts = [n for n, line in enumerate(text.splitlines(), 1) if line == "  {"]
    assert file.lines.tolist() == starts


def test_broken_files(tmp_path):
    broken = tmp_path / "list.json"
    broken.write_text('[\n{"a": 1},\n{"a": \n')
    with pytest.raises(ValueError, match=r"list.json:\d: broken JSON list"):
        RecordFile(broken)
    broken.write_text('[{"a": 1}\n {"b": 2}]')
    with pytest.raises(ValueError, match=r"list.json:\d: expected"):
        RecordFile(broken)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps(talk()) + "\n{broken\n\n" + json.dumps(talk()))
    source = reader(lines)
    assert [source.line(i) for i in range(len(source))] == [1, 2, 4]
    assert source.record(2).turns == source.record(0).turns
    with pytest.raises(BadSample, match="not JSON"):
        source.record(1)


def test_text_after_a_list_is_refused_with_its_place(tmp_path):
    both = tmp_path / "both.json"
    one = json.dumps([talk("ü")], indent=1, ensure_ascii=False) + " \n"
    both.write_text(one)
    assert len(RecordFile(both)) == 1
    both.write_text(one + one)
    line, byte = one.count("\n") + 1, len(one.encode())
    with pytest.raises(ValueError, match=rf"both.json:{line}: text after .* byte {byte} on"):
        RecordFile(both)
    both.write_text("[] []")
    with pytest.raises(ValueError, match=r"both.json:1: text after .* byte 3 on"):
        RecordFile(both)


@pytest.mark.parametrize("text", ["", " \n", " [ ] ", json.dumps({"data": [talk()]}, indent=1)])
def test_messages_about_files_of_another_form_say_what_is_expected(tmp_path, text):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"d.json: .*expected a JSON list, or one JSON object per"):
        RecordFile(path)


@pytest.mark.parametrize("lines", [True, False])
def test_utf16_is_refused_by_name(folder, lines):
    path = folder.write("d.json", [talk(), talk()], lines)
    path.write_text(path.read_text(), encoding="utf-16")
    with pytest.raises(ValueError, match=r"d.json: UTF-16; save it as UTF-8"):
        RecordFile(path)


def test_an_object_around_the_list_and_a_broken_first_line_are_bad_records(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"data": [talk()]}))
    with pytest.raises(BadSample, match=r"no `conversations`, only 'data'; expected a JSON list"):
        reader(path).record(0)
    path.write_text(json.dumps(talk()) + " ?\n" + json.dumps(talk()))
    with pytest.raises(BadSample, match="not JSON"):
        reader(path).record(0)
    path.write_text("[" * 100_000 + "\n" + json.dumps(talk()))
    with pytest.raises(ValueError, match=r"d.json:1: broken JSON list"):
        RecordFile(path)


def test_tally_counts_once_and_stops_at_the_share(caplog):
    def bad(line):
        return Event("bad", "s", "f.json", line, line, "missing_file", "gone")

    tally = Tally(total=1000, max_bad_share=0.01)
    tally.add([bad(1), bad(1)])
    tally.add([bad(1)], loaded=4)
    assert tally.bad == 1
    assert caplog.text.count("f.json:1") == 1
    tally.add([bad(line) for line in range(2, 11)])
    with pytest.raises(TooManyBadSamples, match=r"11 of 1000 .*\n(.*\n)*bad +missing_file +11"):
        tally.add([bad(11)])
    with pytest.raises(TooManyBadSamples, match=r"f.json:3: record 3: gone .*strict"):
        Tally(1000, 0.01, strict=True).add([bad(3)])
    tally = Tally(total=10**6, max_bad_share=0.01)  # 11 of the first 1000 are enough
    with pytest.raises(TooManyBadSamples, match="11 of 1000 samples loaded"):
        tally.add([bad(line) for line in range(11)], loaded=20)


def test_tallies_of_processes_are_joined():
    """All processes find the same events while indexing, but load different samples."""

    def bad(record):
        return Event("bad", "s", "f.json", record, 1, "missing_file", f"{record} is gone")

    tallies = [Tally(total=10, max_bad_share=1) for _ in range(2)]
    for number, tally in enumerate(tallies):
        tally.add([bad(1)])
        tally.add([bad(2 + number), bad(4)], loaded=4)
    texts = [tally.as_text() for tally in tallies]
    for tally in tallies:
        for text in texts:
            tally.join(text)
        assert tally.as_json() == {"total": 10, "bad": {"missing_file": 4}}
    assert "record 1: 1 is gone" in tallies[0].report()


def test_records_on_one_line_are_counted_separately():
    tally = Tally(total=200, max_bad_share=0.01)
    events = [Event("bad", "s", "f.json", n, 1, "missing_file", "gone") for n in (1, 2, 17)]
    with pytest.raises(TooManyBadSamples, match="3 of 200"):
        tally.add([*events, *events])
    assert "f.json:1: record 1: gone" in tally.report()


def test_the_report_shows_the_first_case_of_each_kind_and_reason():
    tally = Tally(total=10, max_bad_share=1)
    cut = Event("truncated", "s", "f.json", 1, 1, "too_long", "longer than 9")
    bad = Event("bad", "s", "f.json", 2, 5, "too_long", "no label left")
    tally.add([cut, bad, cut])
    rows = [line.split() for line in tally.report().splitlines()[1:]]
    assert [row[:3] for row in rows] == [["bad", "too_long", "1"], ["truncated", "too_long", "1"]]
    assert [" ".join(row[-3:]) for row in rows] == ["no label left", "longer than 9"]
    assert tally.as_json() == {"total": 10, "bad": {"too_long": 1}, "truncated": {"too_long": 1}}
