"""A file of questions -> a file of answers: order kept, resumable, one bad question harms no other.

Both are JSON lines. A question is what `request_of` reads; an answer line repeats the question's
`id` (its line number where it has none) and holds `text`, or `error`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from unimoe_jax.generation.errors import GenerationError
from unimoe_jax.generation.model import Model, Prepared
from unimoe_jax.generation.request import Answer, Sampling, request_of


@dataclass(frozen=True)
class Question:
    """One line of the questions. digest: of its text, to tell whether an answer belongs to it."""

    line: int
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """Raises GenerationError where it is no JSON object."""
        try:
            content = json.loads(self.text)
        except ValueError as error:
            raise GenerationError(f"not JSON: {error}") from error
        if not isinstance(content, dict):
            raise GenerationError(f"expected an object, got {self.text:.40}")
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
        GenerationError: a file that cannot be read or written, or answers to other questions.
    """
    todo = _read(questions)
    done = _resume(answers, todo)
    bar = Progress(len(todo), done, progress)
    prepared: list[Prepared] = []
    numbers: list[int] = []
    lines: dict[int, dict[str, Any]] = {}
    for number in range(done, len(todo)):
        try:
            request = request_of(todo[number].content(), questions.parent, sampling)
            prepared.append(model.prepare(request))
            numbers.append(number)
        except GenerationError as error:
            lines[number] = _line(todo[number], error)
    answered, following = 0, done
    try:
        with answers.open("a", encoding="utf-8") as file:

            def flush() -> None:
                nonlocal following
                while following in lines:
                    file.write(json.dumps(lines.pop(following), ensure_ascii=False) + "\n")
                    following += 1
                file.flush()

            flush()
            for at, answer in model.answers(prepared, batch_size):
                lines[numbers[at]] = _line(todo[numbers[at]], answer, prepared[at].sampling)
                answered += isinstance(answer, Answer)
                flush()
                bar.show(following, len(answer.tokens) if isinstance(answer, Answer) else 0)
    except OSError as error:
        raise GenerationError(f"{answers}: cannot be written: {error.strerror}") from error
    bar.close()
    return answered, len(todo) - done - answered


def _line(
    question: Question, answer: Answer | GenerationError, sampling: Sampling | None = None
) -> dict[str, Any]:
    line = {"id": question.name(), "question": question.digest}
    if isinstance(answer, GenerationError):
        return line | {"error": str(answer)}
    return line | {
        "text": answer.text,
        "stop": answer.stop,
        "tokens": len(answer.tokens),
        "prompt_tokens": answer.prompt_tokens,
        "sampling": asdict(sampling),
    }


def _read(path: Path) -> list[Question]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"{path}: cannot be read: {error}") from error
    return [Question(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _resume(path: Path, questions: list[Question]) -> int:
    """How many questions are answered; a last line that broke off is cut away."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines()):
        try:
            digest = json.loads(line)["question"]
        except (ValueError, KeyError, TypeError) as error:
            raise GenerationError(
                f"{path}:{number + 1}: not an answer written by this program; choose another "
                "--output"
            ) from error
        if number >= len(questions) or digest != questions[number].digest:
            raise GenerationError(
                f"{path}:{number + 1}: answers another question than the input has there; choose "
                "another --output"
            )
    if len(whole) < len(data):
        path.write_bytes(whole)
    return len(whole.splitlines())


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
