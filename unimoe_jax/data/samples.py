"""One source's records as streams: measured cheaply for the plan, loaded in full for a batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unimoe_jax.config import MediaName
from unimoe_jax.config.media import MEDIA
from unimoe_jax.data.batch import entry_shapes
from unimoe_jax.data.conversation import Span, pieces_of, tokenize
from unimoe_jax.data.processors import Entries, Processors
from unimoe_jax.data.records import RecordReader
from unimoe_jax.data.stream import Stream, span_length, stream_of, truncate
from unimoe_jax.data.tally import Event
from unimoe_jax.data.tokenizer import Tokenizer


class SampleSize(NamedTuple):
    """Positions of a sample, how many carry labels, its pool entries in `MEDIA` order, and whether
    its answers are `whole`: no label was cut to fit the row."""

    tokens: int
    labels: int
    entries: tuple[int, ...]
    whole: bool


class SampleReader:
    """Turns the records of one source into streams of at most `max_length` positions. Picklable.

    With `vision.unused_images: count` a sample without media is loaded with an image of zeros, to
    which no position refers and which its `Size` does not count.
    """

    def __init__(
        self,
        records: RecordReader,
        tokenizer: Tokenizer,
        processors: Processors,
        template: str,
        max_length: int,
    ):
        self.records = records
        self.tokenizer = tokenizer
        self.processors = processors
        self.template = template
        self.max_length = max_length
        vision, self.blank = processors.model.vision, None
        if vision and vision.unused_images == "count":
            self.blank = np.zeros(entry_shapes(processors.model)["image"], np.float32)
        self.per_entry = processors.model.tokens_per_medium()

    def __len__(self) -> int:
        return len(self.records)

    def spans(self, number: int) -> list[Span]:
        """The tokenised record; raises `BadSample`."""
        record = self.records.record(number)
        return tokenize(pieces_of(record, self.template), self.tokenizer)

    def event(self, number: int, kind: str, reason: str, message: str) -> Event:
        records = self.records
        place = (number + 1, records.line(number))
        return Event(kind, records.name, records.file.path, *place, reason, message)

    def measure(self, number: int) -> tuple[SampleSize, list[Event]]:
        """Size of a sample from text and media headers; an upper bound of what `load` gives.

        Raises `BadSample`.
        """
        spans, events, entries = self.spans(number), [], {}
        for span in spans:
            if span.medium:
                count, found = self.processors.count(span.medium.file)
                entries[span.medium.index] = count
                events += self._capped(number, span.medium.file.modality, count, found)
        tokens = self._tokens(spans, entries)
        answers = _labels(spans)
        spans, cut = truncate(spans, tokens, self.max_length)
        if cut:
            total = sum(tokens.values())
            message = f"longer than {self.max_length} ({total} soft tokens)"
            events.append(self.event(number, "truncated", "too_long", message))
        labels = _labels(spans)
        size = SampleSize(
            sum(span_length(span, tokens) for span in spans),
            labels,
            tuple(self._used(spans, entries).get(name, 0) for name in MEDIA),
            labels == answers,
        )
        return size, events

    def load(self, number: int, size: SampleSize) -> tuple[Stream, list[Event]]:
        """The sample with its media decoded, within the size it was planned with.

        Raises `BadSample`. A file whose header understated its length loses the surplus chunks.
        """
        spans, loaded = self.spans(number), {}
        for span in spans:
            if span.medium:
                loaded[span.medium.index] = self.processors.load(span.medium.file)
        planned = dict(zip(MEDIA, size.entries, strict=True))
        entries, events = self._announced(number, spans, loaded, planned)
        spans, _ = truncate(spans, self._tokens(spans, entries), size.tokens)
        # Files have changed, or a shorter one has made room for media that the plan had left out.
        for name, used in self._used(spans, entries).items():
            surplus = used - planned[name]
            if surplus > 0:
                message = f"{name}: {used} chunks, but {planned[name]} were planned"
                events.append(self.event(number, "capped", "header_too_short", message))
            for span in reversed(spans):
                if surplus > 0 and span.medium and span.medium.file.modality == name:
                    drop = min(surplus, entries[span.medium.index])
                    entries[span.medium.index] -= drop
                    surplus -= drop
        stream = stream_of(spans, self._tokens(spans, entries))
        for span in spans:
            if span.medium and entries[span.medium.index]:
                name, keep = span.medium.file.modality, entries[span.medium.index]
                entry = loaded[span.medium.index]
                stream.pools.setdefault(name, []).extend(entry.arrays[:keep])
                stream.lengths.setdefault(name, []).extend(entry.lengths[:keep])
        if self.blank is not None and not stream.pools:
            stream.pools["image"], stream.lengths["image"] = [self.blank], [0]
        return stream, events

    def _announced(
        self,
        number: int,
        spans: list[Span],
        loaded: dict[int, Entries],
        planned: dict[MediaName, int],
    ) -> tuple[dict[int, int], list[Event]]:
        """How many entries of each medium count. Those beyond its header go before anything else is
        cut: nothing of the text, which was planned without them, is to make room for them."""
        entries, events = {index: len(entry.arrays) for index, entry in loaded.items()}, []
        found = self._used(spans, entries)
        for span in spans:
            name = span.medium and span.medium.file.modality
            if name and found[name] > planned[name]:  # else the header need not be read again
                index, count = span.medium.index, self.processors.count(span.medium.file)[0]
                if entries[index] > count:
                    message = f"{name}: {entries[index]} chunks, but the header said {count}"
                    events.append(self.event(number, "capped", "header_too_short", message))
                entries[index] = min(entries[index], count)
        return entries, events

    def _tokens(self, spans: list[Span], entries: dict[int, int]) -> dict[int, int]:
        return {
            span.medium.index: entries[span.medium.index]
            * self.per_entry[span.medium.file.modality]
            for span in spans
            if span.medium
        }

    @staticmethod
    def _used(spans: list[Span], entries: dict[int, int]) -> dict[MediaName, int]:
        used: dict[MediaName, int] = {}
        for span in spans:
            if span.medium:
                name = span.medium.file.modality
                used[name] = used.get(name, 0) + entries[span.medium.index]
        return used

    def _capped(self, number: int, name: str, count: int, found: int) -> list[Event]:
        if found <= count:
            return []
        message = f"{name}: {found} chunks, the first {count} are used"
        return [self.event(number, "capped", "max_chunks", message)]

    def render(self, number: int) -> str:
        """A sample as text: media as `<name:soft tokens>`, what is learned in `[[…]]`."""
        spans, entries = self.spans(number), {}
        for span in spans:
            if span.medium:
                entries[span.medium.index] = self.processors.count(span.medium.file)[0]
        tokens = self._tokens(spans, entries)
        spans, cut = truncate(spans, tokens, self.max_length)
        parts = []
        for span in spans:
            if span.medium:
                text = f"<{span.medium.file.modality}:{tokens[span.medium.index]}>"
            elif span.ids == (self.tokenizer.bos_id,):
                text = "<bos>"
            elif span.ids == (self.tokenizer.eos_id,):
                text = "<eos>"
            else:
                text = self.tokenizer.decode(span.ids)
            parts.append(f"[[{text}]]" if span.supervised else text)
        size = int(np.sum([span_length(span, tokens) for span in spans]))
        head = f"{self.records.name}:{self.records.line(number)} ({size} positions"
        return f"{head}{', cut' if cut else ''})\n{' '.join(parts)}"


def _labels(spans: list[Span]) -> int:
    """Positions that carry labels."""
    return sum(len(span.ids) for span in spans if span.supervised)
