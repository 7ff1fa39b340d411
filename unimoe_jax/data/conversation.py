"""Turns -> pieces -> token ids with labels.

A template turns a conversation into pieces that know who speaks. Labels are carried from the
pieces to the ids, so nothing is tokenised twice and no count can disagree. Placeholders split the
text; each chunk between them is tokenised on its own, as Uni-MoE and LLaVA do, and therefore
begins with a space of its own.
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


@dataclass(frozen=True)
class Text:
    """Text of one speaker. Supervised text is what the model learns to write.

    Supervised text directly after other text must begin with a space.
    """

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Medium:
    """A placeholder; `file` number `index` of the record in order of appearance."""

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
    """A turn with its placeholders cut out; an answer of None asks the model to speak."""

    role: str
    parts: tuple[str | Medium, ...] | None


Template = Callable[[Iterable[TemplateTurn]], Iterator[Piece]]


def vicuna_v1(messages: Iterable[TemplateTurn]) -> Iterator[Piece]:
    """Vicuna v1.1: system text, then `USER: … ASSISTANT: …</s>` without line breaks."""
    yield Text(VICUNA_SYSTEM + " ")
    yield from vicuna_turns(messages)


def vicuna_turns(messages: Iterable[TemplateTurn]) -> Iterator[Piece]:
    """The turns of Vicuna v1.1 without the system text, for models so small that it would be half
    of what they read."""
    for message in messages:
        if message.role == "human":
            yield Text("USER: ")
            yield from _parts(message)
            yield Text(" ")
        else:
            yield Text("ASSISTANT:")
            if message.parts is not None:
                yield Text(" " + "".join(message.parts), supervised=True)
                yield End()


def plain(messages: Iterable[TemplateTurn]) -> Iterator[Piece]:
    """Alignment: the media, then the caption and a line break. The question is dropped."""
    for message in messages:
        if message.role == "human":
            yield from (part for part in message.parts if isinstance(part, Medium))
        elif message.parts is not None:
            yield Text("".join(message.parts) + "\n", supervised=True)


def mistral_instruct_system(messages: Iterable[TemplateTurn]) -> Iterator[Piece]:
    """CuMo: `mistral_instruct` with Vicuna's system text in the first instruction."""
    return _instructions(messages, f"<<SYS>>\n{VICUNA_SYSTEM}\n<</SYS>>\n\n")


def mistral_instruct(messages: Iterable[TemplateTurn]) -> Iterator[Piece]:
    """Mistral's turns: `[INST] … [/INST] answer </s>`; media go to the front of their turn.

    The original writes `<s>` into the prompt and its tokenizer adds another: two bos begin every
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
    yield Begin()
    for message in messages:
        if message.role == "human":
            yield Text("[INST] " + system)
            yield from _media_first(message)
            yield Text(" [/INST]")
            system = ""
        elif message.parts is not None:
            yield Text(f" {''.join(message.parts)} ", supervised=True)
            yield End()


def _media_first(message: TemplateTurn) -> Iterator[Piece]:
    """Every medium and a line break, then the text without them and without outer space."""
    media = [part for part in message.parts if isinstance(part, Medium)]
    text = "".join(part for part in message.parts if isinstance(part, str))
    text = text.strip() if media else text
    for left, medium in zip(range(len(media) - 1, -1, -1), media, strict=True):
        yield medium
        if left or text:
            yield Text("\n")
    yield Text(text)


def _parts(message: TemplateTurn) -> Iterator[Piece]:
    for part in message.parts:
        yield part if isinstance(part, Medium) else Text(part)


def messages(
    turns: Iterable[Turn], media: dict[str, tuple[MediaFile, ...]], index: int = 0
) -> list[TemplateTurn]:
    """Cut declared placeholders out of human turns and give each its file, in order.

    Everything else that looks like a placeholder stays ordinary text. The caller has checked that
    the numbers match (`RecordReader.record`). index: number of the first medium.
    """
    queues = {placeholder: iter(files) for placeholder, files in media.items()}
    split = re.compile("(" + "|".join(map(re.escape, queues)) + ")") if queues else None
    result = []
    for turn in turns:
        parts: list[str | Medium] = []
        texts = split.split(turn.text) if split and turn.role == "human" else [turn.text]
        for text in texts:
            if turn.role == "human" and text in queues:
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


@dataclass(frozen=True)
class Span:
    """A run of positions: token ids of text, or one medium (`ids` empty)."""

    ids: tuple[int, ...] = ()
    supervised: bool = False
    medium: Medium | None = None


def tokenize(pieces: Iterable[Piece], tokenizer: Tokenizer) -> list[Span]:
    """Pieces -> spans, beginning with bos. Adjacent text of one kind forms one span."""
    spans = [Span((tokenizer.bos_id,))]
    start, after_text = True, False
    for piece in _joined(pieces):
        if isinstance(piece, Medium):
            spans.append(Span(medium=piece))
            start, after_text = True, False
        elif isinstance(piece, Begin | End):
            ends = isinstance(piece, End)
            token = tokenizer.eos_id if ends else tokenizer.bos_id
            spans.append(Span((token,), ends and piece.supervised))
            start, after_text = False, False
        else:
            encode = tokenizer.encode_after_text if after_text else None
            ids = encode(piece.text) if encode else tokenizer.encode(piece.text, start)
            spans.append(Span(tuple(ids), piece.supervised))
            after_text = True
    return [span for span in spans if span.ids or span.medium]


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Join neighbouring texts of equal supervision, so that each is tokenised in one go."""
    held: Text | None = None
    for piece in pieces:
        if isinstance(piece, Text) and held and held.supervised == piece.supervised:
            held = Text(held.text + piece.text, held.supervised)
            continue
        if held:
            yield held
        held = piece if isinstance(piece, Text) else None
        if held is None:
            yield piece
    if held:
        yield held
