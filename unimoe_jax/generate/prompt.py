"""A request -> token ids and placeholders of the conversation's template, and the media to encode.

The same templates, tokenizer and processors as in training; nothing is ever cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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

ROLES = {"user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class Prompt:
    """What the model reads, media not loaded yet."""

    spans: tuple[Span, ...]

    @property
    def media(self) -> tuple[MediaFile, ...]:
        """The files, in the order in which their soft tokens stand."""
        return tuple(span.medium.file for span in self.spans if span.medium)

    def stream(self, soft_tokens: Sequence[int]) -> Stream:
        """Positions, given the soft tokens of each of `media`."""
        indices = [span.medium.index for span in self.spans if span.medium]
        stream = stream_of(list(self.spans), dict(zip(indices, soft_tokens, strict=True)))
        is_soft = stream.modality != TEXT
        # One table for all media, in the order of the stream.
        slot = np.where(is_soft, np.cumsum(is_soft) - 1, -1).astype(np.int32)
        return replace(stream, slot=slot)


def make_prompt(
    request: Request, template: str, tokenizer: Tokenizer, accepts: frozenset[MediaName]
) -> Prompt:
    """The request as its template writes it, waiting for the assistant.

    Raises:
        GenerationError: turns out of order, media of a kind that the model cannot take, or
            placeholders that do not fit the files.
    """
    _check_turns(request.messages)
    asked: list[conversation.TemplateTurn] = []
    known: set[str] = set()
    index = 0
    for number, message in enumerate(request.messages):
        files: dict[str, tuple[MediaFile, ...]] = {}
        for medium in message.media:
            if medium.kind not in accepts:
                takes = ", ".join(sorted(accepts)) or "text only"
                raise GenerationError(
                    f"{medium.kind} {medium.paths[0]}: this model has no encoder for it; it takes "
                    f"{takes}"
                )
            placeholder, file = PLACEHOLDER[medium.kind], MediaFile(medium.kind, medium.paths)
            files[placeholder] = (*files.get(placeholder, ()), file)
        known |= files.keys()
        turn = Turn(ROLES[message.role], _with_placeholders(message, number, known))
        # With its own files alone: a placeholder that was text when it was asked stays text.
        asked += messages([turn], files, index)
        index += len(message.media)
    return Prompt(tuple(tokenize(prompt_pieces(asked, template), tokenizer)))


def unanswered_tags(request: Request) -> str | None:
    """What to tell the user where the last question names media that nobody gave: `make_prompt`
    reads such placeholders as text, as they may be meant so."""
    given = {PLACEHOLDER[m.kind] for message in request.messages for m in message.media}
    tags = [
        tag for tag in PLACEHOLDER_ORDER if tag in request.messages[-1].text and tag not in given
    ]
    if not tags:
        return None
    kinds = [" or ".join(k for k, own in PLACEHOLDER.items() if own == tag) for tag in tags]
    return f"the prompt names {', '.join(tags)} but no {', '.join(kinds)} was given; read as text"


def _check_turns(messages: tuple[Message, ...]) -> None:
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
    """The text with a placeholder for each of its files: its own, or in front, in the
    order of `PLACEHOLDER_ORDER`.

    known: placeholders of what was given so far; others are text.
    """
    text, front = message.text, ""
    if message.role == "assistant":
        return text
    for placeholder in PLACEHOLDER_ORDER:
        given = sum(PLACEHOLDER[medium.kind] == placeholder for medium in message.media)
        found = text.count(placeholder)
        if given and not found:
            front += f"{placeholder}\n" * given
        elif found != given and placeholder in known:
            raise GenerationError(
                f"message {number} has {found} {placeholder} for {given} file(s) of that kind; "
                "write one for each file, or none"
            )
    return front + text
