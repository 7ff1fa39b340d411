"""Files of questions and answers: their order, interrupted runs, and bad questions."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.question_files import answer_file

SHORT = Sampling(max_new_tokens=5)


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
    """Answers keep the order, bad questions are recorded, and an interrupted file is continued."""
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
    target.write_text("".join(lines[:2]) + lines[2][:9])  # interrupted inside the third line
    assert answer_file(model, source, target, SHORT, 2, io.StringIO()) == (2, 3)
    assert target.read_text() == whole
    assert answer_file(model, source, target, SHORT, 2, io.StringIO()) == (0, 0)


def test_only_the_incomplete_line_is_cut_off(model, tmp_path, monkeypatch):
    """Complete answers are not written again, because an interruption would lose them."""
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": 1}\n{"prompt": 2}\n')
    assert answer_file(model, source, target, SHORT, 2, io.StringIO()) == (0, 2)
    whole = target.read_bytes()
    target.write_bytes(whole[:-5])
    monkeypatch.setattr(Path, "write_bytes", None)
    assert answer_file(model, source, target, SHORT, 2, io.StringIO()) == (0, 1)
    assert target.read_bytes() == whole


@pytest.mark.parametrize("text", ["notes, and no line end", '{"loss": 0.5}', '{"id": 8', "\0x"])
def test_only_an_incomplete_answer_is_cut_off(model, tmp_path, text):
    """A file without a complete line may be some other file, so it is left as it is."""
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"id": 7, "prompt": 1}\n')
    target.write_text(text)
    with pytest.raises(GenerationError, match=r"answers.jsonl: .*would be lost; choose another"):
        answer_file(model, source, target, SHORT, 2, io.StringIO())
    assert target.read_text() == text
    target.unlink()
    assert answer_file(model, source, target, SHORT, 2, io.StringIO()) == (0, 1)
    whole = target.read_bytes()
    for rest in (whole[:1], whole[:9], whole[:60], whole[:-1], whole[:30] + b"\0\0"):
        target.write_bytes(rest)
        assert answer_file(model, source, target, SHORT, 2, io.StringIO()) == (0, 1)
        assert target.read_bytes() == whole
    target.write_bytes(whole + b"more")
    with pytest.raises(GenerationError, match="b'more'"):
        answer_file(model, source, target, SHORT, 2, io.StringIO())


def test_answers_to_other_questions_are_refused(model, files, tmp_path):
    source, target = questions(tmp_path, files), tmp_path / "answers.jsonl"
    target.write_text('{"id": 1, "question": "0000", "text": "x"}\n')
    with pytest.raises(GenerationError, match="another question"):
        answer_file(model, source, target, SHORT, 2, io.StringIO())


def test_answers_with_other_settings_are_refused(model, tmp_path):
    """This holds for error lines as well, and nothing is written."""
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": 1}\n{"prompt": 2}\n')

    def answer(asked=model, sampling=SHORT):
        return answer_file(asked, source, target, sampling, 2, io.StringIO())

    assert answer() == (0, 2)
    whole = target.read_text()
    target.write_text(whole[:-5])
    changes = [
        {"sampling": replace(SHORT, seed=1)},
        {"asked": replace(model, checksums="b")},
        {"asked": replace(model, template="vicuna_v1", defaults=Sampling(0.5))},
    ]
    for change in changes:
        with pytest.raises(GenerationError, match=r"answers.jsonl:1: .*another --output"):
            answer(**change)
        assert target.read_text() == whole[:-5]
    assert answer() == (0, 1)
    assert target.read_text() == whole
    lines = [{k: v for k, v in line.items() if k != "settings"} for line in answers(target)]
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(GenerationError, match="other settings"):
        answer()


HOSTILE_LINES = {
    '{"id": "\\ud800", "prompt": "x"}': "id = '\\ud800'",
    '{"id": NaN, "prompt": "x"}': "id = nan",
    '{"prompt": "a\\ud800b"}': "character 2",
    '{"prompt": "x", "image": "\\ud800.png"}': "ud800.png",
    '{"prompt": "x", "image": "/tmp/%s.png"}' % ("a" * 300): "too long",
    '{"prompt": "x", "temperature": 1%s}' % ("0" * 400): "temperature = 1000",
    '{"prompt": "x", "top_k": 100000000000}': "top_k = 1000",
    "[" * 100_000: "nested",
    '{"id": %s, "prompt": "x"}' % ("[" * 100_000): "nested",
}


def test_hostile_questions_are_recorded(model, tmp_path):
    """Each is recorded as an error that names the fault, in JSON that every reader accepts."""
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(HOSTILE_LINES))
    found = answer_file(model, source, target, SHORT, 2, io.StringIO())
    assert found == (0, len(HOSTILE_LINES))
    for line, piece in zip(answers(target), HOSTILE_LINES.values(), strict=True):
        assert piece in line["error"]
        assert len(line["error"]) < 500
        json.dumps(line, ensure_ascii=False, allow_nan=False).encode()
    assert [line["id"] for line in answers(target)] == list(range(1, len(HOSTILE_LINES) + 1))


def test_lines_of_a_questions_file(model, tmp_path):
    """A byte order mark and Windows line ends do not belong to a question; a line separator inside
    a string does."""
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    text = '{"id": "a", "prompt": 1}\r\n\n{"id": "b\u2028c\x85", "prompt": 2}'
    source.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert answer_file(model, source, target, SHORT, 2, io.StringIO()) == (0, 2)
    found = [json.loads(line) for line in target.read_text().rstrip("\n").split("\n")]
    assert [line["id"] for line in found] == ["a", "b\u2028c\x85"]
    source.write_bytes(b'{"prompt": "x"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(GenerationError, match=r"questions.jsonl:2: not UTF-8"):
        answer_file(model, source, target, SHORT, 2, io.StringIO())
