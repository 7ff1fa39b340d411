"""A conversation with history, in which files are attached to the next question."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from unimoe_jax.config import MEDIA, MediaName
from unimoe_jax.data.records import MediaFile
from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.model import Model
from unimoe_jax.generate.prompt import unanswered_tags
from unimoe_jax.generate.request import Media, Message, Request, ask

HELP = (
    "/image PATH, /video PATH, /speech PATH, /audio PATH attach a file to the next question; "
    "/reset begins a new conversation; /exit or end of input leaves; an empty line asks with the "
    "attached files alone"
)
ATTACH: dict[str, MediaName] = {f"/{kind}": kind for kind in MEDIA}
"""Commands that attach a file, and its kind."""


class Chat:
    """One conversation. It knows no terminal: `ask` yields text.

    Attributes:
        history: questions and complete answers so far.
        attached: files for the next question.
    """

    def __init__(self, model: Model, sampling: Sampling = Sampling()):
        self.model, self.sampling = model, sampling
        self.history: list[Message] = []
        self.attached: list[Media] = []

    def attach(self, medium: Media) -> None:
        """Attach a file to the next question.

        Raises:
            GenerationError: the model cannot take it, or it is missing or unreadable.
        """
        self.model.prepare(ask("", [medium], Sampling(max_new_tokens=1)))
        # Encode the file while the user types the question; the encoder remembers it.
        self.model.media.encode([MediaFile(medium.kind, medium.paths)])
        self.attached.append(medium)

    def reset(self) -> None:
        """Forget the history and the attached files."""
        self.history, self.attached = [], []

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece. A complete answer and its question enter the history.

        Raises:
            GenerationError: the question cannot be answered; the history does not change.
        """
        request = self.request(text)
        answer = yield from self.model.stream(request)
        self.history = [*request.messages, Message("assistant", answer.text)]
        self.attached = []

    def request(self, text: str) -> Request:
        """The conversation with `text` and the attached files as its next turn."""
        turn = Message("user", text, tuple(self.attached))
        return Request((*self.history, turn), self.sampling)


def run_chat(chat: Chat, lines: Iterable[str] = sys.stdin, out: TextIO = sys.stdout) -> None:
    """Read questions and commands until the end. Errors are printed, and the chat goes on."""
    print(HELP, file=out)
    is_terminal = hasattr(out, "isatty") and out.isatty()
    prompt = "> " if is_terminal else ""
    print(prompt, end="", file=out, flush=True)
    for line in lines:
        text = line.strip()
        try:
            if text == "/exit":
                return
            _run_line(chat, text, out)
        except GenerationError as error:
            print(f"error: {error}", file=out)
        print(prompt, end="", file=out, flush=True)


def _run_line(chat: Chat, text: str, out: TextIO) -> None:
    """Run one command, or ask one question and print the answer as it is generated."""
    command, _, argument = text.partition(" ")
    name = command[1:] if command.startswith("/") else None
    if name == "reset":
        chat.reset()
        print("a new conversation", file=out)
    elif name == "help":
        print(HELP, file=out)
    elif command in ATTACH:
        _attach(chat, command, argument.strip(), out)
    elif name is not None and "/" not in name:
        # A question may begin with a path such as /home/a.
        raise GenerationError(f"unknown command {command}; {HELP}")
    elif text or chat.attached:
        if note := unanswered_tags(chat.request(text)):
            print(f"note: {note}", file=sys.stderr)
        for piece in chat.ask(text):
            print(piece, end="", file=out, flush=True)
        print(file=out)


def _attach(chat: Chat, command: str, path: str, out: TextIO) -> None:
    """Run `/image PATH`, `/video PATH`, `/speech PATH` or `/audio PATH`."""
    if not path:
        raise GenerationError(f"{command} needs a path")
    path = os.path.expanduser(path)  # no shell has expanded ~
    chat.attach(Media(ATTACH[command], (path,)))
    print(f"attached {len(chat.attached)}: {path}", file=out)
