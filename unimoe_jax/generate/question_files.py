"""A file of questions -> a file of answers: order kept, resumable, one bad question harms no other.

Both are JSON lines. A question is what `request_of` reads; an answer line repeats the question's
`id` (its line number where it has none that can be written) and holds `text`, or `error`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.model import Model, Prepared
from unimoe_jax.generate.request import Answer, request_of


@dataclass(frozen=True)
class Question:
    """One line of the questions. digest: of its text, to tell whether an answer belongs to it."""

    line: int
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """Raises GenerationError where it is no JSON object, or its id cannot be written."""
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
        """The id that its answer carries."""
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
    """(answered, failed) of the questions that `answers` did not hold yet.

    Raises:
        GenerationError: a file that cannot be read or written, or answers that were made otherwise.
    """
    todo = _read(questions)
    settings = _settings(model, sampling)
    done = _resume(answers, todo, settings)
    bar = Progress(len(todo), done, progress)
    ready: dict[int, Prepared] = {}
    lines: dict[int, dict[str, Any]] = {}
    for number in range(done, len(todo)):
        try:
            ready[number] = _prepare(model, todo[number], questions.parent, sampling)
        except GenerationError as error:
            lines[number] = _line(todo[number], settings, error)
    numbers, answered, following = list(ready), 0, done
    try:
        with answers.open("a", encoding="utf-8") as file:

            def flush() -> None:
                nonlocal following
                while following in lines:
                    file.write(_json_line(lines.pop(following)))
                    following += 1
                file.flush()

            flush()
            for at, answer in model.answers(ready.values(), batch_size):
                number, good = numbers[at], isinstance(answer, Answer)
                lines[number] = _line(todo[number], settings, answer, ready[number].sampling)
                answered += good
                flush()
                bar.show(following, len(answer.tokens) if good else 0)
    except OSError as error:
        raise GenerationError(f"{answers}: cannot be written: {error.strerror}") from error
    bar.close()
    return answered, len(todo) - done - answered


def _prepare(model: Model, question: Question, root: Path, defaults: Sampling) -> Prepared:
    return model.prepare(request_of(question.content(), root, defaults))


def _settings(model: Model, sampling: Sampling) -> str:
    """A digest of what, beside the question, decides its answer: model, template, precision and
    the sampling that a question does not set itself."""
    decisive = {
        "checksums": model.checksums,
        "config": model.config.model_dump(mode="json"),
        "template": model.template,
        "precision": str(model.engine.decoder.dtype),
        "eos": model.engine.eos,
        "sampling": asdict(sampling.over(model.defaults).checked()),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _json_line(content: Any) -> str:
    """Raises ValueError or RecursionError where it is not JSON in UTF-8."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text + "\n"


def _line(
    question: Question,
    settings: str,
    answer: Answer | GenerationError,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    line = _head(question, settings)
    if isinstance(answer, GenerationError):
        # The names of files may hold what is not Unicode.
        return line | {"error": str(answer).encode(errors="backslashreplace").decode()}
    return line | {
        "text": answer.text,
        "stop": answer.stop,
        "tokens": len(answer.tokens),
        "prompt_tokens": answer.prompt_tokens,
        "sampling": asdict(sampling),
    }


def _head(question: Question, settings: str) -> dict[str, Any]:
    """What every line of answers begins with."""
    return {"id": question.name(), "question": question.digest, "settings": settings}


def _read(path: Path) -> list[Question]:
    try:
        data = path.read_bytes()
        # Not `splitlines`: a JSON string may hold other line separators of Unicode.
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise GenerationError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise GenerationError(
            f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error
    return [Question(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _resume(path: Path, questions: list[Question], settings: str) -> int:
    """How many questions are answered; a last line that broke off is cut away."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines()):
        try:
            answer = json.loads(line)
            digest = answer["question"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise GenerationError(
                f"{path}:{number + 1}: not an answer written by this program; choose another "
                "--output"
            ) from error
        if number >= len(questions) or digest != questions[number].digest:
            raise GenerationError(
                f"{path}:{number + 1}: answers another question than the input has there; choose "
                "another --output"
            )
        if answer.get("settings") != settings:
            raise GenerationError(
                f"{path}:{number + 1}: answered with another model or with other settings "
                "(sampling, template, precision); give those again, or choose another --output"
            )
    done = len(whole.splitlines())
    if len(whole) < len(data):
        _check_broken(path, data[len(whole) :], questions[done : done + 1], settings)
        os.truncate(path, len(whole))  # what stands before is not touched
    return done


def _check_broken(path: Path, rest: bytes, questions: list[Question], settings: str) -> None:
    """The rest of a file is cut away only if it is the beginning of the next answer."""
    rest = rest.rstrip(b"\0")  # what a machine that went down may leave
    begins = [_json_line(_head(question, settings))[:-2].encode() for question in questions]
    if not any(rest.startswith(line[: len(rest)]) for line in begins):
        raise GenerationError(
            f"{path}: its end, {rest[:40]!r}, is no answer to the next question by this model and "
            "these settings, and would be lost; choose another --output"
        )


class Progress:
    """A bar on a terminal, else a line now and then."""

    def __init__(self, total: int, done: int, out: TextIO):
        self.total, self.first, self.done, self.out = total, done, done, out
        self.tokens, self.started, self.shown = 0, time.monotonic(), 0.0
        if done:
            print(f"{done} of {total} were answered before", file=out)

    def show(self, done: int, tokens: int) -> None:
        """`done`: answers written; `tokens`: made since the last call."""
        self.done, self.tokens = done, self.tokens + tokens
        now = time.monotonic()
        live = self.out.isatty()
        if now - self.shown >= (0.2 if live else 10.0):
            self.shown = now
            print(
                f"\r{self._text(now)}" if live else self._text(now),
                end="" if live else "\n",
                file=self.out,
                flush=True,
            )

    def _text(self, now: float) -> str:
        seconds = max(now - self.started, 1e-9)
        full = 30 * self.done // max(1, self.total)
        return (
            f"[{'#' * full}{'.' * (30 - full)}] {self.done}/{self.total}  "
            f"{(self.done - self.first) / seconds:.1f} answers/s  {self.tokens / seconds:.0f} "
            "tokens/s"
        )

    def close(self) -> None:
        """The last state."""
        end = "\r" if self.out.isatty() else ""
        print(end + self._text(time.monotonic()), file=self.out)
