"""Spans of a sample -> a stream of positions, cut to the length of a row.

A placeholder becomes one position per soft token. A stream that is longer than a row is cut so that
every medium stays whole (or is left out) and at least one label is left.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np

from unimoe_jax.config import MediaName
from unimoe_jax.config.media import MEDIA, MODALITY, TEXT
from unimoe_jax.data.conversation import Span
from unimoe_jax.data.tally import BadSample

MIN_ANSWER_SHARE = 4
"""A prompt that fills the row is cut until 1/4 of the row is left for the answer."""


def span_length(span: Span, tokens: dict[int, int]) -> int:
    """Positions of a span; `tokens` maps the index of a medium to its number of soft tokens."""
    return tokens[span.medium.index] if span.medium else len(span.ids)


def truncate(spans: list[Span], tokens: dict[int, int], length: int) -> tuple[list[Span], bool]:
    """Cut a sample to at most `length` positions: (spans, whether something was cut).

    The end is cut first, and a medium that the cut would hit is dropped as a whole. If no label is
    left after that, the longest texts of the prompt are shortened in their middle instead, and the
    first answer is kept, with its end if there is room for it. Raises `BadSample` ("too_long") if
    the media alone leave no room for a label.

    Example: 1 bos, 10 ids, an image of 8 soft tokens and an answer of 21 ids are 40 positions. Cut
    to 25, the answer keeps its first 6 ids. Cut to 15, the image would end at position 19, so the
    image and the answer are dropped; no label is left, so the 10 ids are shortened to 3 (the first
    2 and the last), and bos, these 3 ids, the image and 3 ids of the answer are kept.
    """
    sizes = [span_length(span, tokens) for span in spans]
    if sum(sizes) <= length:
        return spans, False
    # Keep spans from the beginning until the row is full.
    kept, room = [], length
    for span, size in zip(spans, sizes, strict=True):
        if size > room and span.medium:
            break
        kept.append(span if size <= room else replace(span, ids=span.ids[:room]))
        room -= min(size, room)
        if not room:
            break
    if any(span.supervised and span.ids for span in kept):
        return kept, True
    return _shorten_prompt(spans, sizes, length), True


def _shorten_prompt(spans: list[Span], sizes: list[int], length: int) -> list[Span]:
    """Shorten the texts before the first answer, so that the media and the answer fit."""
    first = next(i for i, span in enumerate(spans) if span.supervised)
    prompt, answer = spans[:first], list(takewhile(lambda span: span.supervised, spans[first:]))
    media = sum(size for span, size in zip(prompt, sizes, strict=False) if span.medium)
    if media + 2 > length:  # bos and one label
        raise BadSample("too_long", f"{media} soft tokens leave no label in a row of {length}")
    # The answer gets at most a quarter of the row, and bos and the media always stay.
    answer_length = sum(len(span.ids) for span in answer)
    room = min(answer_length, max(1, length // MIN_ANSWER_SHARE), length - media - 1)
    ids = [span.ids for span in prompt]
    _cut_longest(ids, excess=sum(map(len, ids)) + media + room - length)
    shortened = [replace(span, ids=new_ids) for span, new_ids in zip(prompt, ids, strict=True)]
    # Fill the room of the answer from its beginning.
    for span in answer:
        shortened.append(replace(span, ids=span.ids[:room]))
        room -= len(shortened[-1].ids)
    return [span for span in shortened if span.medium or span.ids]


def _cut_longest(ids: list[tuple[int, ...]], excess: int) -> None:
    """Remove `excess` ids (in place) from the middle of the longest texts; `ids[0]` is bos and
    stays.

    The longest text is cut to the length of the second longest, and texts of equal length lose one
    id at a time in turn. Example: with an excess of 5, texts of 9 and 6 ids become 6 and 6, then 5
    and 5 ids.
    """
    while excess > 0:
        longest = max(range(1, len(ids)), key=lambda i: len(ids[i]))
        others = [len(text) for i, text in enumerate(ids) if i not in (0, longest)]
        second_length = max(others, default=0)
        cut = min(excess, max(len(ids[longest]) - second_length, 1))
        keep = len(ids[longest]) - cut
        # Of an odd number of ids that are kept, the beginning gets one more than the end.
        head, tail = keep - keep // 2, keep // 2
        ids[longest] = ids[longest][:head] + (ids[longest][-tail:] if tail else ())
        excess -= cut


@dataclass
class Stream:
    """One sample, position by position.

    token_id, slot int32 [n], modality int32 [n], supervised bool [n]. `slot` counts the soft
    tokens within the sample and modality (-1 for text). pools: the pool entries of the sample, by
    medium; lengths: valid samples of each audio entry.
    """

    token_id: np.ndarray
    supervised: np.ndarray
    modality: np.ndarray
    slot: np.ndarray
    pools: dict[MediaName, list[np.ndarray]] = field(default_factory=dict)
    lengths: dict[MediaName, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_id)


def stream_of(spans: list[Span], tokens: dict[int, int]) -> Stream:
    """Lay out spans as positions. `tokens` as in `span_length`; the caller fills the pools.

    Example: bos, an image of 2 soft tokens, the ids 7 8, and another image have the slots
    [-1, 0, 1, -1, -1, 2, 3].
    """
    total = sum(span_length(span, tokens) for span in spans)
    stream = Stream(
        token_id=np.zeros(total, np.int32),
        supervised=np.zeros(total, bool),
        modality=np.full(total, TEXT, np.int32),
        slot=np.full(total, -1, np.int32),
    )
    # Soft tokens so far, by medium: slots count per medium over the whole sample.
    used = dict.fromkeys(MEDIA, 0)
    start = 0
    for span in spans:
        end = start + span_length(span, tokens)
        if span.medium:
            name = span.medium.file.modality
            stream.modality[start:end] = MODALITY[name]
            stream.slot[start:end] = np.arange(used[name], used[name] + end - start)
            used[name] += end - start
        else:
            stream.token_id[start:end] = span.ids
            stream.supervised[start:end] = span.supervised
        start = end
    return stream
