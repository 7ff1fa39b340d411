"""Turns -> pieces -> token ids with labels.

A template turns a conversation into pieces, and marks the pieces that the model learns to write.
These labels are carried from the pieces to the ids, so nothing is tokenised twice and no two counts
can disagree. Placeholders split the text. Each chunk of text between them is tokenised by itself,
as Uni-MoE and LLaVA do, and therefore begins with a space that SentencePiece adds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from unimoe_jax.data.records import MediaFile, Record, Turn
from unimoe_jax.data.tokenizer import Tokenizer

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


# -------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True)
class Text:
    """Text of one speaker. The model learns to write supervised text.

    Supervised text directly after other text must begin with a space.
    """

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Medium:
    """A placeholder and its file. index: its number among the media of the record, in order of
    appearance."""

    placeholder: str
    file: MediaFile
    index: int


@dataclass(frozen=True)
class End:
    """The end-of-sequence token of the template."""

    supervised: bool = True


@dataclass(frozen=True)
class Begin:
    """A beginning-of-sequence token that the template writes itself."""


Piece = Text | Medium | End | Begin


@dataclass(frozen=True)
class TemplateTurn:
    """A turn whose placeholders have been cut out of its text.

    parts: texts and media in order; None in place of an answer asks the model to speak.
    """

    role: str
    parts: tuple[str | Medium, ...] | None

    @property
    def text(self) -> str:
        """The text of the turn without its media."""
        return "".join(part for part in self.parts or () if isinstance(part, str))

    @property
    def media(self) -> list[Medium]:
        """The media of the turn, in order."""
        return [part for part in self.parts or () if isinstance(part, Medium)]


# ----------------------------------------------------------------------------------- templates

Template = Callable[[Iterable[TemplateTurn]], Iterator[Piece]]


def vicuna_v1(messages: Iterable[TemplateTurn]) -> Iterator[Piece]:
    """Vicuna v1.1: system text, then `USER: … ASSISTANT: …</s>` without line breaks."""
    yield Text(VICUNA_SYSTEM + " ")
    yield from vicuna_turns(messages)


def vicuna_turns(messages: Iterable[TemplateTurn]) -> Iterator[Piece]:
    """The turns of Vicuna v1.1 without the system text, for models so small that the system text
    would be half of what they read."""
    for message in messages:
        if message.role == "human":
            yield Text("USER: ")
            for part in message.parts or ():
                yield part if isinstance(part, Medium) else Text(part)
            yield Text(" ")
        else:
            yield Text("ASSISTANT:")
            if message.parts is not None:
                yield Text(" " + message.text, supervised=True)
                yield End()


def plain(messages: Iterable[TemplateTurn]) -> Iterator[Piece]:
    """Alignment: the media, then the caption and a line break. The question is dropped."""
    for message in messages:
        if message.role == "human":
            yield from message.media
        elif message.parts is not None:
            yield Text(message.text + "\n", supervised=True)


def mistral_instruct_system(messages: Iterable[TemplateTurn]) -> Iterator[Piece]:
    """CuMo: `mistral_instruct` with Vicuna's system text in the first instruction."""
    return _instructions(messages, f"<<SYS>>\n{VICUNA_SYSTEM}\n<</SYS>>\n\n")


def mistral_instruct(messages: Iterable[TemplateTurn]) -> Iterator[Piece]:
    """Mistral's turns: `[INST] … [/INST] answer </s>`; media go to the front of their turn.

    The original writes `<s>` into the prompt and its tokenizer adds another, so two bos begin every
    sample, in training and in generation. The space between answer and `</s>` is learned.
    """
    return _instructions(messages, "")


TEMPLATES: dict[str, Template] = {
    "vicuna_v1": vicuna_v1,
    "vicuna_turns": vicuna_turns,
    "plain": plain,
    "mistral_instruct_system": mistral_instruct_system,
    "mistral_instruct": mistral_instruct,
}


def _instructions(messages: Iterable[TemplateTurn], system: str) -> Iterator[Piece]:
    """Mistral's turns, with `system` at the beginning of the first instruction only."""
    yield Begin()
    for message in messages:
        if message.role == "human":
            yield Text("[INST] " + system)
            yield from _media_first(message)
            yield Text(" [/INST]")
            system = ""
        elif message.parts is not None:
            yield Text(f" {message.text} ", supervised=True)
            yield End()


def _media_first(message: TemplateTurn) -> Iterator[Piece]:
    """Every medium and a line break, then the text without the media.

    If there are media, white space at both ends of the text is removed, and the last line break is
    left out if no text follows. Example: "what <image> is" gives <image>, "\\n" and "what  is".
    """
    text = message.text.strip() if message.media else message.text
    media_left = len(message.media)
    for medium in message.media:
        media_left -= 1
        yield medium
        if media_left or text:
            yield Text("\n")
    yield Text(text)


# ---------------------------------------------------------------------------- records to pieces


def messages(
    turns: Iterable[Turn], media: dict[str, tuple[MediaFile, ...]], index: int = 0
) -> list[TemplateTurn]:
    """Cut the declared placeholders out of human turns and give each its file, in order.

    Everything else that looks like a placeholder stays ordinary text. The caller has checked that
    there are as many placeholders as files (`RecordReader.record`). index: number of the first
    medium.
    """
    # The files that have not been assigned yet, by placeholder.
    queues = {placeholder: iter(files) for placeholder, files in media.items()}
    # A group in the pattern makes `split` return the placeholders too.
    pattern = re.compile("(" + "|".join(map(re.escape, queues)) + ")") if queues else None
    result = []
    for turn in turns:
        parts: list[str | Medium] = []
        is_question = turn.role == "human"
        texts = pattern.split(turn.text) if pattern and is_question else [turn.text]
        for text in texts:
            if is_question and text in queues:
                parts.append(Medium(text, next(queues[text]), index))
                index += 1
            elif text:
                parts.append(text)
        result.append(TemplateTurn(turn.role, tuple(parts)))
    return result


def pieces_of(record: Record, template: str) -> list[Piece]:
    """The pieces of a training record."""
    return list(TEMPLATES[template](messages(record.turns, record.media)))


def prompt_pieces(asked: Iterable[TemplateTurn], template: str) -> list[Piece]:
    """The pieces of a conversation that waits for the assistant's next answer."""
    return list(TEMPLATES[template]([*asked, TemplateTurn("gpt", None)]))


# ----------------------------------------------------------------------------- pieces to spans


@dataclass(frozen=True)
class Span:
    """A run of positions: token ids of text, or one medium (`ids` empty)."""

    ids: tuple[int, ...] = ()
    supervised: bool = False
    medium: Medium | None = None


def tokenize(pieces: Iterable[Piece], tokenizer: Tokenizer) -> list[Span]:
    """Tokenise pieces into spans, beginning with bos. Adjacent text of one kind forms one span."""
    spans = [Span((tokenizer.bos_id,))]
    # opens_chunk: the next text opens a chunk (see `Tokenizer.encode`); after_text: it continues
    # text of the other kind, and its ids must be those of the whole text.
    opens_chunk, after_text = True, False
    for piece in _join_texts(pieces):
        if isinstance(piece, Medium):
            spans.append(Span(medium=piece))
            opens_chunk, after_text = True, False
        elif isinstance(piece, Begin):
            spans.append(Span((tokenizer.bos_id,)))
            opens_chunk, after_text = False, False
        elif isinstance(piece, End):
            spans.append(Span((tokenizer.eos_id,), piece.supervised))
            opens_chunk, after_text = False, False
        else:
            if after_text:
                ids = tokenizer.encode_after_text(piece.text)
            else:
                ids = tokenizer.encode(piece.text, opens_chunk)
            spans.append(Span(tuple(ids), piece.supervised))
            after_text = True
    return [span for span in spans if span.ids or span.medium]


def _join_texts(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Join neighbouring texts of equal supervision, so that they are tokenised together.

    Example: Text("USER: "), Text("hi"), Text(" ho", supervised=True) give Text("USER: hi") and
    Text(" ho", supervised=True).
    """
    waiting: Text | None = None
    for piece in pieces:
        if isinstance(piece, Text) and waiting and waiting.supervised == piece.supervised:
            waiting = Text(waiting.text + piece.text, waiting.supervised)
            continue
        if waiting:
            yield waiting
        if isinstance(piece, Text):
            waiting = piece
        else:
            waiting = None
            yield piece
    if waiting:
        yield waiting
