"""A request -> token ids and placeholders as the conversation template writes them.

Templates, tokenizer and processors are those of training. No prompt is ever cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from unimoe_jax.config import MediaName
from unimoe_jax.config.media import PLACEHOLDER, TEXT
from unimoe_jax.data import conversation
from unimoe_jax.data.conversation import Span, messages, prompt_pieces, tokenize
from unimoe_jax.data.records import MediaFile, Turn
from unimoe_jax.data.stream import Stream, stream_of
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.request import PLACEHOLDER_ORDER, Message, Request

ROLES: dict[str, Literal["human", "gpt"]] = {"user": "human", "assistant": "gpt"}
"""Roles of messages -> roles of training records."""


@dataclass(frozen=True)
class Prompt:
    """Everything that the model reads, in spans of text and single media. No file is read yet."""

    spans: tuple[Span, ...]

    @property
    def media(self) -> tuple[MediaFile, ...]:
        """The files, in the order of their soft tokens."""
        return tuple(span.medium.file for span in self.spans if span.medium)

    def stream(self, soft_tokens: Sequence[int]) -> Stream:
        """Positions of the prompt, if the files of `media` have so many soft tokens each.

        All soft tokens of a prompt are in one table, in the order of the stream. Example: text,
        an image of 2 soft tokens, text, a sound of 3 -> slots -1, 0, 1, -1, 2, 3, 4 (one position
        of text each).
        """
        indices = [span.medium.index for span in self.spans if span.medium]
        stream = stream_of(list(self.spans), dict(zip(indices, soft_tokens, strict=True)))
        is_soft = stream.modality != TEXT
        slot = np.where(is_soft, np.cumsum(is_soft) - 1, -1).astype(np.int32)
        return replace(stream, slot=slot)


def make_prompt(
    request: Request, template: str, tokenizer: Tokenizer, accepts: frozenset[MediaName]
) -> Prompt:
    """Write a request as its template does, up to the place where the assistant's answer begins.

    accepts: media that the model has encoders for.

    Raises:
        GenerationError: turns are out of order, the model has no encoder for a file, or
            placeholders and files do not match.
    """
    _check_turns(request.messages)
    turns: list[conversation.TemplateTurn] = []
    known: set[str] = set()
    index = 0  # of the next file among all files of the conversation
    for number, message in enumerate(request.messages):
        files = _files_by_placeholder(message, accepts)
        known |= files.keys()
        turn = Turn(ROLES[message.role], _with_placeholders(message, number, known))
        # Give every turn only the files that came with it: a placeholder that was plain text when
        # its turn was asked stays text, even if a later turn brings a file of this kind.
        turns += messages([turn], files, index)
        index += len(message.media)
    return Prompt(tuple(tokenize(prompt_pieces(turns, template), tokenizer)))


def _files_by_placeholder(
    message: Message, accepts: frozenset[MediaName]
) -> dict[str, tuple[MediaFile, ...]]:
    """{placeholder: its files in the given order} of one message."""
    files: dict[str, tuple[MediaFile, ...]] = {}
    for medium in message.media:
        if medium.kind not in accepts:
            takes = ", ".join(sorted(accepts)) or "text only"
            raise GenerationError(
                f"{medium.kind} {medium.paths[0]}: this model has no encoder for it; it takes "
                f"{takes}"
            )
        # Speech and audio share a placeholder.
        placeholder, file = PLACEHOLDER[medium.kind], MediaFile(medium.kind, medium.paths)
        files[placeholder] = (*files.get(placeholder, ()), file)
    return files


def unanswered_tags(request: Request) -> str | None:
    """A note for the user if the last question has placeholders without any file of their kind.

    `make_prompt` reads such placeholders as text, because the user may mean them as text.
    """
    given = {PLACEHOLDER[m.kind] for message in request.messages for m in message.media}
    text = request.messages[-1].text
    tags = [tag for tag in PLACEHOLDER_ORDER if tag in text and tag not in given]
    if not tags:
        return None
    kinds = [
        " or ".join(kind for kind, placeholder in PLACEHOLDER.items() if placeholder == tag)
        for tag in tags
    ]
    return f"the prompt names {', '.join(tags)} but no {', '.join(kinds)} was given; read as text"


def _check_turns(messages: tuple[Message, ...]) -> None:
    """User and assistant alternate, and the user asks last, with text or media."""
    if not messages:
        raise GenerationError("a request needs at least one message")
    for number, message in enumerate(messages):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise GenerationError(
                f"message {number} is the {message.role}'s; turns alternate and begin with the user"
            )
        if message.role == "assistant" and message.media:
            raise GenerationError(f"message {number}: media belong to the user's turns")
    if messages[-1].role != "user":
        raise GenerationError("the last message must be the user's")
    last = messages[-1]
    if not last.text.strip() and not last.media:
        raise GenerationError("the question is empty: give text or media")


def _with_placeholders(message: Message, number: int, known: set[str]) -> str:
    """The text of a message with one placeholder for each of its files.

    If the user has written none, placeholders are put in front, in PLACEHOLDER_ORDER. Example: the
    text "Compare" with two images and a sound becomes "<image>\\n<image>\\n<audio>\\nCompare".

    known: placeholders with files in this or an earlier message; other placeholders are text.
    """
    text, front = message.text, ""
    if message.role == "assistant":
        return text
    # Compare the number of files with the number of placeholders, kind by kind.
    for placeholder in PLACEHOLDER_ORDER:
        files = sum(PLACEHOLDER[medium.kind] == placeholder for medium in message.media)
        written = text.count(placeholder)
        if files and not written:
            front += f"{placeholder}\n" * files
        elif written != files and placeholder in known:
            raise GenerationError(
                f"message {number} has {written} {placeholder} for {files} file(s) of that kind; "
                "write one for each file, or none"
            )
    return front + text
