"""A file of questions -> a file of answers, in the same order.

Both files are JSON lines. A question is an object that `request_of` reads. An answer repeats the
question's `id` (its line number if it has none that can be written) and holds `text`, or `error`:
a bad question is recorded and does not stop the others. If a run is interrupted, the next one
continues its file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.model import Model, Prepared
from unimoe_jax.generate.request import Answer, request_of


@dataclass(frozen=True)
class Question:
    """One line of the questions. line: its number in the file, from 1."""

    line: int
    text: str

    @property
    def digest(self) -> str:
        """Identifies the text, so that an answer can be matched with its question."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """The JSON object of the line.

        Raises:
            GenerationError: the line is no JSON object, or its id cannot be written into an answer.
        """
        try:
            content = json.loads(self.text)
        except RecursionError as error:
            raise GenerationError("not a question: nested too deeply") from error
        except ValueError as error:
            raise GenerationError(f"not JSON: {error}") from error
        if not isinstance(content, dict):
            raise GenerationError(f"expected an object, got {self.text:.40}")
        for key in ("id", "question_id"):
            try:
                _json_line(content.get(key))
            except (ValueError, RecursionError) as error:
                raise GenerationError(
                    f"{key} = {content[key]!r:.60} cannot be written as JSON in UTF-8"
                ) from error
        return content

    def name(self) -> Any:
        """The `id` of its answer: that of the question, else the line number."""
        try:
            content = self.content()
        except GenerationError:
            return self.line
        return content.get("id", content.get("question_id", self.line))


def answer_file(
    model: Model,
    questions: Path,
    answers: Path,
    sampling: Sampling,
    batch_size: int,
    progress: TextIO = sys.stderr,
) -> tuple[int, int]:
    """Answer all questions that `answers` has no answer for, and append the answers to it.

    sampling: settings that a question does not have. Returns (answered, failed), without the
    answers of earlier runs.

    Raises:
        GenerationError: a file cannot be read or written, or `answers` holds answers to other
            questions or with other settings.
    """
    # Find out how many answers an earlier run has written.
    all_questions = _read_questions(questions)
    settings = _settings_digest(model, sampling)
    done = _resume(answers, all_questions, settings)
    bar = Progress(len(all_questions), done, progress)
    # Check all other questions before any of them is answered.
    ready: dict[int, Prepared] = {}
    bad_lines: dict[int, dict[str, Any]] = {}
    for number, question in enumerate(all_questions[done:], done):
        try:
            ready[number] = _prepare(model, question, questions.parent, sampling)
        except GenerationError as error:
            bad_lines[number] = _error_line(question, settings, error)
    # Answer them, and write answers in the order of the questions.
    numbers, answered = list(ready), 0
    try:
        with answers.open("a", encoding="utf-8") as file:
            writer = _OrderedWriter(file, done, bad_lines)
            for position, answer in model.answers(ready.values(), batch_size):
                number = numbers[position]
                question = all_questions[number]
                if isinstance(answer, Answer):
                    answered += 1
                    line = _answer_line(question, settings, answer, ready[number])
                else:
                    line = _error_line(question, settings, answer)
                writer.add(number, line)
                bar.show(writer.next_number, len(getattr(answer, "tokens", ())))
    except OSError as error:
        raise GenerationError(f"{answers}: cannot be written: {error.strerror}") from error
    bar.close()
    return answered, len(all_questions) - done - answered


def _prepare(model: Model, question: Question, root: Path, defaults: Sampling) -> Prepared:
    """Check a question; paths in it are relative to `root`."""
    return model.prepare(request_of(question.content(), root, defaults))


def _read_questions(path: Path) -> list[Question]:
    """All lines of a file that are not blank."""
    try:
        # Do not use `splitlines`: a JSON string may hold other line separators of Unicode.
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise GenerationError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise GenerationError(
            f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error
    return [Question(number, line) for number, line in enumerate(lines, 1) if line.strip()]


# ------------------------------------------------------------------------------ answer lines


def _settings_digest(model: Model, sampling: Sampling) -> str:
    """Identifies everything besides the question that decides its answer.

    That is model, template, precision, end tokens, and the sampling settings that a question does
    not set itself.
    """
    programs = model.engine.programs
    decisive = {
        "checksums": model.checksums,
        "config": model.config.model_dump(mode="json"),
        "template": model.template,
        "precision": str(programs.decoder.dtype),
        "eos": programs.eos,
        "sampling": asdict(sampling.over(model.defaults).checked()),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _line_start(question: Question, settings: str) -> dict[str, Any]:
    """The first keys of every line of answers."""
    return {"id": question.name(), "question": question.digest, "settings": settings}


def _answer_line(
    question: Question, settings: str, answer: Answer, prepared: Prepared
) -> dict[str, Any]:
    return _line_start(question, settings) | {
        "text": answer.text,
        "stop": answer.stop,
        "tokens": len(answer.tokens),
        "prompt_tokens": answer.prompt_tokens,
        "sampling": asdict(prepared.sampling),
    }


def _error_line(question: Question, settings: str, error: GenerationError) -> dict[str, Any]:
    # File names in messages may hold bytes that are not Unicode.
    text = str(error).encode(errors="backslashreplace").decode()
    return _line_start(question, settings) | {"error": text}


def _json_line(content: Any) -> str:
    """A value as one line of JSON.

    Raises:
        ValueError, RecursionError: the value cannot be written as JSON in UTF-8.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text + "\n"


class _OrderedWriter:
    """Writes lines in the order of their numbers, each as soon as all lines before it are written.

    first: number of the first line. lines: {number: content} of lines that are known already.

    Attributes:
        next_number: all lines below it are written.
    """

    def __init__(self, file: TextIO, first: int, lines: Mapping[int, dict[str, Any]]):
        self.file, self.next_number = file, first
        self._waiting = dict(lines)
        self._write()

    def add(self, number: int, content: dict[str, Any]) -> None:
        """Write a line, or keep it until the lines before it are there."""
        self._waiting[number] = content
        self._write()

    def _write(self) -> None:
        while self.next_number in self._waiting:
            self.file.write(_json_line(self._waiting.pop(self.next_number)))
            self.next_number += 1
        self.file.flush()


# ---------------------------------------------------------------------------------- resuming


def _resume(path: Path, questions: list[Question], settings: str) -> int:
    """The number of questions that `path` answers. An incomplete last line is cut off.

    Raises:
        GenerationError: the file holds something else.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    lines = complete.splitlines()
    for number, line in enumerate(lines):
        question = questions[number] if number < len(questions) else None
        _check_answer(f"{path}:{number + 1}", line, question, settings)
    done = len(lines)
    if len(complete) < len(data):
        _check_incomplete(path, data[len(complete) :], questions[done : done + 1], settings)
        # Truncating leaves the complete answers untouched, even if it is interrupted.
        os.truncate(path, len(complete))
    return done


def _check_answer(where: str, line: bytes, question: Question | None, settings: str) -> None:
    """Check that a line answers this question with these settings.

    Raises:
        GenerationError: it does not; the message begins with `where`.
    """
    try:
        answer = json.loads(line)
        digest = answer["question"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise GenerationError(
            f"{where}: not an answer written by this program; choose another --output"
        ) from error
    if question is None or digest != question.digest:
        raise GenerationError(
            f"{where}: answers another question than the input has there; choose another --output"
        )
    if answer.get("settings") != settings:
        raise GenerationError(
            f"{where}: answered with another model or with other settings (sampling, template, "
            "precision); give those again, or choose another --output"
        )


def _check_incomplete(path: Path, rest: bytes, questions: list[Question], settings: str) -> None:
    """Check that the incomplete last line begins like the answer to the next question.

    questions: the next question, or nothing if all are answered. Any other text may be somebody's
    file, which must not be cut.
    """
    rest = rest.rstrip(b"\0")  # a machine that lost power may have left zeros
    # Without the closing brace and the line end.
    begins = [_json_line(_line_start(question, settings))[:-2].encode() for question in questions]
    if not any(rest.startswith(line[: len(rest)]) for line in begins):
        raise GenerationError(
            f"{path}: its end, {rest[:40]!r}, is no answer to the next question by this model and "
            "these settings, and would be lost; choose another --output"
        )


# ---------------------------------------------------------------------------------- progress


class Progress:
    """Shows progress as a bar on a terminal, and as a line every ten seconds in a file.

    total: number of questions. done: those that an earlier run has answered.
    """

    def __init__(self, total: int, done: int, out: TextIO):
        self.total, self.first, self.done, self.out = total, done, done, out
        self.tokens, self.started, self.shown = 0, time.monotonic(), 0.0
        if done:
            print(f"{done} of {total} were answered before", file=out)

    def show(self, done: int, tokens: int) -> None:
        """Show the progress if enough time has passed.

        done: answers written so far. tokens: tokens generated since the last call.
        """
        self.done, self.tokens = done, self.tokens + tokens
        now = time.monotonic()
        is_terminal = self.out.isatty()
        if now - self.shown >= (0.2 if is_terminal else 10.0):
            self.shown = now
            # On a terminal, every bar overwrites the one before.
            start, end = ("\r", "") if is_terminal else ("", "\n")
            print(start + self._text(now), end=end, file=self.out, flush=True)

    def _text(self, now: float) -> str:
        seconds = max(now - self.started, 1e-9)
        full = 30 * self.done // max(1, self.total)
        return (
            f"[{'#' * full}{'.' * (30 - full)}] {self.done}/{self.total}  "
            f"{(self.done - self.first) / seconds:.1f} answers/s  {self.tokens / seconds:.0f} "
            "tokens/s"
        )

    def close(self) -> None:
        """Show the final state."""
        start = "\r" if self.out.isatty() else ""
        print(start + self._text(time.monotonic()), file=self.out)
