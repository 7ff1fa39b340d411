"""Samples -> streams of positions -> rows of a batch.

A placeholder becomes one position per soft token. A stream longer than a row is cut so that no
medium is cut and at least one label is left.
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
"""A prompt that fills the row is cut to leave this fraction of it to the answer."""


def span_length(span: Span, tokens: dict[int, int]) -> int:
    """Positions a span takes; `tokens` maps a medium's index to its soft tokens."""
    return tokens[span.medium.index] if span.medium else len(span.ids)


def truncate(spans: list[Span], tokens: dict[int, int], length: int) -> tuple[list[Span], bool]:
    """Cut a sample to at most `length` positions: (spans, whether something was cut).

    The end goes first, and a medium that the cut would hit goes as a whole. If that leaves no
    label, the longest prompt texts are shortened in their middle instead and the first answer
    kept, with its end if that has room. Raises `BadSample` ("too_long") when the media alone leave
    no room for a label.
    """
    sizes = [span_length(span, tokens) for span in spans]
    if sum(sizes) <= length:
        return spans, False
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
    first = next(i for i, span in enumerate(spans) if span.supervised)
    prompt, answer = spans[:first], list(takewhile(lambda span: span.supervised, spans[first:]))
    media = sum(size for span, size in zip(prompt, sizes, strict=False) if span.medium)
    if media + 2 > length:
        raise BadSample("too_long", f"{media} soft tokens leave no label in a row of {length}")
    whole = sum(len(span.ids) for span in answer)
    room = min(whole, max(1, length // MIN_ANSWER_SHARE), length - media - 1)
    ids = [span.ids for span in prompt]
    excess = sum(map(len, ids)) + media + room - length
    while excess > 0:
        longest = max(range(1, len(ids)), key=lambda i: len(ids[i]))  # the first is bos
        rest = max((len(part) for i, part in enumerate(ids) if i not in (0, longest)), default=0)
        cut = min(excess, max(len(ids[longest]) - rest, 1))
        keep = len(ids[longest]) - cut
        ids[longest] = ids[longest][: keep - keep // 2] + (
            ids[longest][-(keep // 2) :] if keep // 2 else ()
        )
        excess -= cut
    shortened = [replace(span, ids=new) for span, new in zip(prompt, ids, strict=True)]
    for span in answer:
        shortened.append(replace(span, ids=span.ids[:room]))
        room -= len(shortened[-1].ids)
    return [span for span in shortened if span.medium or span.ids]


@dataclass
class Stream:
    """One sample, position by position.

    token_id, slot int32 [n], modality int32 [n], supervised bool [n]. `slot` counts the soft
    tokens within the sample and modality (-1 for text). pools: the sample's entries per medium;
    lengths: valid samples of each audio entry.
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
    """Spans -> positions. `tokens` as in `span_length`; pools are left to the caller."""
    total = sum(span_length(span, tokens) for span in spans)
    stream = Stream(
        token_id=np.zeros(total, np.int32),
        supervised=np.zeros(total, bool),
        modality=np.full(total, TEXT, np.int32),
        slot=np.full(total, -1, np.int32),
    )
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
