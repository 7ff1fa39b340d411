"""An interactive session: a conversation with history, and media attached to the next question."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from unimoe_jax.config import MEDIA
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


class Chat:
    """The history of one conversation. Knows no terminal: `ask` yields text."""

    def __init__(self, model: Model, sampling: Sampling = Sampling()):
        self.model, self.sampling = model, sampling
        self.history: list[Message] = []
        self.attached: list[Media] = []

    def attach(self, medium: Media) -> None:
        """Give the next question a file.

        Raises:
            GenerationError: the model cannot take it, or it is missing or unreadable.
        """
        self.model.prepare(ask("", [medium], Sampling(max_new_tokens=1)))
        # Encoded while the user types; the question finds it remembered.
        self.model.media.encode([MediaFile(medium.kind, medium.paths)])
        self.attached.append(medium)

    def reset(self) -> None:
        """Forget everything."""
        self.history, self.attached = [], []

    def ask(self, text: str) -> Iterator[str]:
        """The answer piece by piece. The turn is kept when the answer is complete.

        Raises:
            GenerationError: the question cannot be answered; the history is as before.
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
    """Read questions and commands until the end; what cannot be done is said and passed over."""
    print(HELP, file=out)
    prompt = "> " if getattr(out, "isatty", bool)() else ""
    print(prompt, end="", file=out, flush=True)
    for line in lines:
        text = line.strip()
        try:
            if text == "/exit":
                return
            _turn(chat, text, out)
        except GenerationError as error:
            print(f"error: {error}", file=out)
        print(prompt, end="", file=out, flush=True)


def _turn(chat: Chat, text: str, out: TextIO) -> None:
    command, _, rest = text.partition(" ")
    if command == "/reset":
        chat.reset()
        print("a new conversation", file=out)
    elif command == "/help":
        print(HELP, file=out)
    elif command[:1] == "/" and command[1:] in MEDIA:
        if not rest.strip():
            raise GenerationError(f"{command} needs a path")
        path = os.path.expanduser(rest.strip())  # no shell has seen it
        chat.attach(Media(command[1:], (path,)))
        print(f"attached {len(chat.attached)}: {path}", file=out)
    elif command[:1] == "/" and "/" not in command[1:]:
        raise GenerationError(f"unknown command {command}; {HELP}")
    elif text or chat.attached:
        if note := unanswered_tags(chat.request(text)):
            print(f"note: {note}", file=sys.stderr)
        for piece in chat.ask(text):
            print(piece, end="", file=out, flush=True)
        print(file=out)
