"""The records of one source as streams: measured from headers for the plan, loaded in full for a
batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unimoe_jax.config import MediaName
from unimoe_jax.config.media import MEDIA
from unimoe_jax.data.batch import entry_shapes
from unimoe_jax.data.conversation import Medium, Span, pieces_of, tokenize
from unimoe_jax.data.processors import Entries, Processors
from unimoe_jax.data.records import RecordReader
from unimoe_jax.data.stream import Stream, span_length, stream_of, truncate
from unimoe_jax.data.tally import Event, EventKind
from unimoe_jax.data.tokenizer import Tokenizer


class SampleSize(NamedTuple):
    """The size of one sample, after it was cut to the row length.

    tokens: positions; labels: positions that carry labels; entries: pool entries in the order of
    `MEDIA`; whole: no label was cut to fit the row.
    """

    tokens: int
    labels: int
    entries: tuple[int, ...]
    whole: bool


class SampleReader:
    """Turns the records of one source into streams of at most `max_length` positions. Picklable.

    With `vision.unused_images: count` a sample without media is loaded with an image of zeros. No
    position refers to that image, and the sample's `SampleSize` does not count it.
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
        """The tokenised record `number`; raises `BadSample`."""
        record = self.records.record(number)
        return tokenize(pieces_of(record, self.template), self.tokenizer)

    def event(self, number: int, kind: EventKind, reason: str, message: str) -> Event:
        """An event of record `number`, with its place in the file."""
        return Event(
            kind=kind,
            source=self.records.name,
            file=self.records.file.path,
            record=number + 1,
            line=self.records.line(number),
            reason=reason,
            message=message,
        )

    def measure(self, number: int) -> tuple[SampleSize, list[Event]]:
        """Size of a sample from its text and media headers; an upper bound of what `load` returns.

        Raises `BadSample`.
        """
        spans = self.spans(number)
        events: list[Event] = []
        # Count the pool entries of every medium, from the header of its file.
        entries: dict[int, int] = {}
        for medium in _media_of(spans):
            count, in_file = self.processors.count(medium.file)
            entries[medium.index] = count
            if in_file > count:
                name = medium.file.modality
                message = f"{name}: {in_file} chunks, the first {count} are used"
                events.append(self.event(number, "capped", "max_chunks", message))
        # Cut the sample to the row length.
        tokens = self._tokens(spans, entries)
        labels_before = _count_labels(spans)
        spans, was_cut = truncate(spans, tokens, self.max_length)
        if was_cut:
            total = sum(tokens.values())
            message = f"longer than {self.max_length} ({total} soft tokens)"
            events.append(self.event(number, "truncated", "too_long", message))
        # The size is what the cut has left.
        labels, used = _count_labels(spans), _count_entries(spans, entries)
        size = SampleSize(
            tokens=sum(span_length(span, tokens) for span in spans),
            labels=labels,
            entries=tuple(used.get(name, 0) for name in MEDIA),
            whole=labels == labels_before,
        )
        return size, events

    def load(self, number: int, size: SampleSize) -> tuple[Stream, list[Event]]:
        """Return the sample with its media decoded, within the size it was planned with.

        A file whose header understated its length loses the surplus chunks. Raises `BadSample`.
        """
        spans = self.spans(number)
        loaded = {medium.index: self.processors.load(medium.file) for medium in _media_of(spans)}
        planned = dict(zip(MEDIA, size.entries, strict=True))
        entries, events = self._limit_to_headers(number, spans, loaded, planned)
        # Cut the sample as it was cut when it was measured.
        spans, _ = truncate(spans, self._tokens(spans, entries), size.tokens)
        events += self._limit_to_plan(number, spans, entries, planned)
        # Lay out the positions, and attach the pool entries that are left of each medium.
        stream = stream_of(spans, self._tokens(spans, entries))
        for medium in _media_of(spans):
            name, keep = medium.file.modality, entries[medium.index]
            if keep:
                file_entries = loaded[medium.index]
                stream.pools.setdefault(name, []).extend(file_entries.arrays[:keep])
                stream.lengths.setdefault(name, []).extend(file_entries.lengths[:keep])
        if self.blank is not None and not stream.pools:
            stream.pools["image"], stream.lengths["image"] = [self.blank], [0]
        return stream, events

    def _limit_to_headers(
        self,
        number: int,
        spans: list[Span],
        loaded: dict[int, Entries],
        planned: dict[MediaName, int],
    ) -> tuple[dict[int, int], list[Event]]:
        """Limit every medium to the pool entries that its header announced.

        Returns the entries to use, by index of the medium, and an event per surplus. The surplus
        is dropped before the sample is cut: the text was planned without it, so no text may be cut
        to make room for it.

        Example: a header announced 1 chunk of speech, the file decodes to 3. Chunks 2 and 3 are
        dropped, and the answer keeps all its tokens.
        """
        events: list[Event] = []
        entries = {index: len(entry.arrays) for index, entry in loaded.items()}
        decoded = _count_entries(spans, entries)
        for medium in _media_of(spans):
            name, index = medium.file.modality, medium.index
            # The header has to be read again only if there are more entries than planned.
            if decoded[name] > planned[name]:
                announced, _ = self.processors.count(medium.file)
                if entries[index] > announced:
                    message = f"{name}: {entries[index]} chunks, but the header said {announced}"
                    events.append(self.event(number, "capped", "header_too_short", message))
                entries[index] = min(entries[index], announced)
        return entries, events

    def _limit_to_plan(
        self,
        number: int,
        spans: list[Span],
        entries: dict[int, int],
        planned: dict[MediaName, int],
    ) -> list[Event]:
        """Reduce `entries` (in place) to the pool entries that were planned, from the last medium
        backwards; return an event per medium with a surplus.

        The files may have changed since they were measured. Also, a file that is shorter than its
        header said may have made room in the row for media that the plan had left out.
        """
        events: list[Event] = []
        for name, used in _count_entries(spans, entries).items():
            surplus = used - planned[name]
            if surplus > 0:
                message = f"{name}: {used} chunks, but {planned[name]} were planned"
                events.append(self.event(number, "capped", "header_too_short", message))
            for medium in reversed(_media_of(spans)):
                if surplus > 0 and medium.file.modality == name:
                    drop = min(surplus, entries[medium.index])
                    entries[medium.index] -= drop
                    surplus -= drop
        return events

    def _tokens(self, spans: list[Span], entries: dict[int, int]) -> dict[int, int]:
        """Soft tokens of every medium, by its index."""
        return {
            medium.index: entries[medium.index] * self.per_entry[medium.file.modality]
            for medium in _media_of(spans)
        }

    def render(self, number: int) -> str:
        """Return a sample as text: media as `<name:soft tokens>`, learned text in `[[…]]`."""
        # Cut the sample as `measure` does.
        spans = self.spans(number)
        entries = {
            medium.index: self.processors.count(medium.file)[0] for medium in _media_of(spans)
        }
        tokens = self._tokens(spans, entries)
        spans, was_cut = truncate(spans, tokens, self.max_length)
        # Write span by span; control tokens have no text, so they get a name.
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
        positions = sum(span_length(span, tokens) for span in spans)
        place = f"{self.records.name}:{self.records.line(number)}"
        cut = ", cut" if was_cut else ""
        return f"{place} ({positions} positions{cut})\n{' '.join(parts)}"


def _media_of(spans: list[Span]) -> list[Medium]:
    return [span.medium for span in spans if span.medium]


def _count_entries(spans: list[Span], entries: dict[int, int]) -> dict[MediaName, int]:
    """Pool entries of the media in `spans`, by modality; `entries` maps a medium's index to its
    pool entries."""
    used: dict[MediaName, int] = {}
    for medium in _media_of(spans):
        name = medium.file.modality
        used[name] = used.get(name, 0) + entries[medium.index]
    return used


def _count_labels(spans: list[Span]) -> int:
    """Positions that carry labels."""
    return sum(len(span.ids) for span in spans if span.supervised)
