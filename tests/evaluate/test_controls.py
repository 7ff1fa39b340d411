"""Controls of a score: chance levels, and questions with the media of another record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.helpers import data_config, talk
from unimoe_jax.config import ConfigError
from unimoe_jax.evaluate import controls
from unimoe_jax.evaluate.__main__ import print_scores
from unimoe_jax.evaluate.controls import chance_levels, with_shuffled_media


def shuffled(folder: Path, records: list[dict]) -> list[dict]:
    """Shuffle the media of the records and return the new records."""
    (folder / "in.json").write_text(json.dumps(records))
    (folder / "out").mkdir()
    data = with_shuffled_media(data_config(folder / "in.json"), ["all"], folder / "out")
    return json.loads(Path(data.sources["all"].path).read_text())


def test_chance_levels_read_files_as_the_loader_does(tmp_path):
    """A byte-order mark does not matter, and records that the loader counts as bad are left out."""
    broken = [
        {"conversations": [{"from": "human"}, {"from": "gpt"}]},
        {"conversations": "abc"},
        {"conversations": [1, 2]},
        {},
    ]
    good = [talk("a?", "x"), talk("b?", "x"), talk("c?", "y"), talk("d?", "x")]
    lines = [json.dumps(content) for content in (*good, *broken)]
    file = tmp_path / "data.jsonl"
    file.write_text("\ufeff" + "\n".join([*lines, '{"broken', "[1]"]))
    assert chance_levels(data_config(file), ["all"]) == {"all": 0.75}
    file.write_text(json.dumps(broken))
    assert chance_levels(data_config(file), ["all"]) == {"all": 0}


def test_chance_levels_need_few_comparisons(tmp_path, monkeypatch):
    """Comparing every question with every other would take minutes for ten thousand of them."""
    compared = []

    class Question(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    pairs = [(Question(n // 3), "ab"[n % 3 > 0]) for n in range(300)]
    monkeypatch.setattr(controls, "_answered", lambda records: pairs)
    (tmp_path / "data.json").write_text(json.dumps([talk("a?", "x")]))
    assert chance_levels(data_config(tmp_path / "data.json"), ["all"]) == {"all": 2 / 3}
    assert len(compared) < 10 * len(pairs)


def test_no_record_keeps_its_media(tmp_path):
    """A record gets as many files as its text has placeholders; one without media is unchanged."""
    pictures = [talk(f"<image> {n}", image=f"{n}.png") for n in range(4)]
    pairs = [talk(f"<image><image> {n}", image=[f"{n}.png", f"{n}x.png"]) for n in range(3)]
    voices = [talk("<audio>", voice=f"{n}.wav", voice_modality="audio") for n in range(2)]
    texts = [talk("who?"), talk("what?")]
    records = [item for group in (pictures, texts, pairs, voices) for item in group]
    result = shuffled(tmp_path, records)
    for before, after in zip(records, result, strict=True):
        assert after["conversations"] == before["conversations"]
        assert after.keys() == before.keys()
        if len(before) == 1:  # it has no media
            continue
        assert after != before
        (kind,) = {"image", "voice"} & after.keys()
        assert isinstance(after[kind], str) == isinstance(before[kind], str)


def test_records_do_not_get_media_from_records_with_the_same_picture(tmp_path):
    records = [talk(f"<image> {n}", image=f"{n % 3}.png") for n in range(9)]
    result = shuffled(tmp_path, records)
    assert all(a["image"] != b["image"] for a, b in zip(result, records, strict=True))


def test_records_without_another_record_of_the_same_media_are_left_out(tmp_path, caplog):
    """The warning has their number; if no record is left, the command is refused."""
    pictures = [talk(f"<image> {n}", image=f"{n}.png") for n in range(2)]
    alone = talk("<image> <audio>", image="a.png", voice="a.wav")
    result = shuffled(tmp_path, [*pictures, alone])
    assert [item["image"] for item in result] == ["1.png", "0.png"]
    assert "1 of 3 records" in caplog.text
    same = [talk(f"<image> {n}", image="a.png") for n in range(3)]
    (tmp_path / "again").mkdir()
    with pytest.raises(ConfigError, match=r"in.json: 3 of 3 records .* nothing to shuffle"):
        shuffled(tmp_path / "again", same)


@pytest.mark.parametrize("shuffled", [False, True])
def test_scores_are_aligned_with_their_headings(shuffled, capsys):
    print_scores({"a": (1.0, 0.05), "long name": (0.5, 0.25)}, shuffled=shuffled)
    head, *rows = capsys.readouterr().out.splitlines()
    assert {len(row) for row in rows} == {len(head)}
    ends = head.index("  chance")
    assert [row[:ends].split()[-1] for row in rows] == ["100.0%", "50.0%"]
    assert [row[ends:].split() for row in rows] == [["5.0%"], ["25.0%"]]
