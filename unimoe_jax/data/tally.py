"""Count the faults of the data while they are read: bad, truncated and capped samples, by reason.

Worker processes cannot share counters with the main process, so every batch that they load carries
its `Event`s, and the main process adds them up here.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

log = logging.getLogger("unimoe_jax.data")
# Events found while indexing are the same on every process of a run, so only process 0 logs them
# (see `distributed.initialize`).
index_log = logging.getLogger("unimoe_jax.data.index")

MIN_SEEN = 1000
"""The share of bad samples is judged over at least so many samples (or all there are)."""
MAX_LOGGED = 50
"""Samples of one kind and reason that are logged."""

EventKind = Literal["bad", "truncated", "capped"]
_Key = tuple[str, str, int, str, str]
"""(source, file, record, kind, reason) of an event; every key is counted once."""


class BadSample(Exception):
    """A record that cannot be trained on. `reason` is a short key; `message` names the file, field
    or turn that is wrong."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self):
        # Exceptions are pickled with one argument, but this class takes two.
        return BadSample, (self.reason, self.message)


class TooManyBadSamples(RuntimeError):
    """More bad samples than `loader.max_bad_share` allows (or any, with `loader.strict`)."""


@dataclass(frozen=True)
class Event:
    """Something that happened to one sample and is counted. A "bad" sample was skipped; the other
    kinds changed the sample.

    record: number of the record in the file, from 1; line: the line on which it begins, which many
    records of a JSON list may have in common.
    """

    kind: EventKind
    source: str
    file: str
    record: int
    line: int
    reason: str
    message: str

    @property
    def where(self) -> str:
        """File, line and record, as messages begin."""
        return f"{self.file}:{self.line}: record {self.record}"


def pack_events(events: list[Event], loaded: int) -> np.ndarray:
    """Events and the number of samples loaded, as bytes that travel beside a batch."""
    text = json.dumps({"loaded": loaded, "events": [asdict(event) for event in events]})
    return np.frombuffer(text.encode(), np.uint8)


def unpack_events(data: np.ndarray) -> tuple[list[Event], int]:
    """Inverse of `pack_events`."""
    content = json.loads(data.tobytes().decode())
    return [Event(**event) for event in content["events"]], content["loaded"]


@dataclass
class Tally:
    """Counts of a pipeline. Every sample is counted once per reason, and the first ones are logged.

    total: samples of the data set, good and bad; loaded: samples read for batches so far; counts:
    samples by (kind, reason); examples: the first message of each (kind, reason).
    """

    total: int
    max_bad_share: float
    strict: bool = False
    loaded: int = 0
    counts: Counter = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    _seen: set[_Key] = field(default_factory=set)
    _seen_while_loading: list[_Key] = field(default_factory=list)
    _bad_while_loading: int = 0

    def add(self, events: list[Event], loaded: int = 0) -> None:
        """Count `events`, which occurred while `loaded` samples were loaded (0: while indexing).

        Raises `TooManyBadSamples`, with a report, when the bad samples exceed the allowed share of
        the data set or of the samples loaded so far; with `strict`, at the first bad sample.

        Example: with an allowed share of 0.01, a data set of 5000 samples may have 50 bad ones. Of
        the first 1000 samples that are loaded, 10 may be bad, and the 11th stops the run.
        """
        self.loaded += loaded
        for event in events:
            key = (event.source, event.file, event.record, event.kind, event.reason)
            # In later epochs the same samples have the same events again.
            if key in self._seen:
                continue
            message = f"{event.where}: {event.message}"
            self._count(key, message)
            if loaded:
                self._seen_while_loading.append(key)
            self._log(event, message, log if loaded else index_log)
            if event.kind == "bad":
                self._bad_while_loading += loaded > 0
                if self.strict:
                    raise TooManyBadSamples(f"{message} ({event.reason}; strict)")
        self._check(self.bad, self.total, "of the data set")
        # Judge early failures over MIN_SEEN samples, so that one bad sample among the first few
        # does not stop the run; after the first epoch, over all samples.
        base = max(min(self.loaded, self.total), min(self.total, MIN_SEEN))
        self._check(self._bad_while_loading, base, "loaded")

    def _count(self, key: _Key, message: str) -> None:
        kind, reason = key[-2:]
        self._seen.add(key)
        self.counts[kind, reason] += 1
        self.examples.setdefault((kind, reason), message)

    def as_text(self) -> str:
        """The part of the tally that `join` adds to another tally of the same data.

        Events found while indexing are left out, because every process has found them itself.
        """
        examples = [[kind, reason, text] for (kind, reason), text in self.examples.items()]
        return json.dumps({"met": self._seen_while_loading, "examples": examples})

    def join(self, text: str) -> None:
        """Add the events of another process, or of an earlier start of the run (see `as_text`).

        Processes load different samples within an epoch, but the same ones in later epochs, so an
        event that is known already is not counted again. Nothing is checked here. From the next
        `add` on, joined bad samples count towards the allowed share of the data set, but not of the
        samples that this process has loaded.
        """
        other = json.loads(text)
        examples = {(kind, reason): message for kind, reason, message in other["examples"]}
        for source, file, record, kind, reason in other["met"]:
            key = (source, file, record, kind, reason)
            if key not in self._seen:
                self._count(key, examples[kind, reason])

    def _log(self, event: Event, message: str, logger: logging.Logger) -> None:
        """Log the first `MAX_LOGGED` events of a kind and reason: a wrong file has a bad sample on
        every line."""
        number = self.counts[event.kind, event.reason]
        level = logging.WARNING if event.kind == "bad" else logging.INFO
        if number <= MAX_LOGGED:
            logger.log(level, "%s (%s: %s)", message, event.kind, event.reason)
        if number == MAX_LOGGED:
            logger.log(level, "more of these (%s: %s) are only counted", event.kind, event.reason)

    def _check(self, bad: int, base: int, description: str) -> None:
        """Raise if `bad` is more than the allowed share of `base` samples."""
        if bad > self.max_bad_share * base:
            raise TooManyBadSamples(
                f"{bad} of {base} samples {description} are bad ({bad / max(base, 1):.2%}, allowed "
                f"{self.max_bad_share:.2%})\n{self.report()}"
            )

    @property
    def bad(self) -> int:
        """Number of distinct bad samples."""
        return self.count("bad")

    def count(self, kind: str, reason: str | None = None) -> int:
        """Number of distinct samples of a kind, with one reason or (None) with any reason."""
        return sum(
            number
            for (counted_kind, counted_reason), number in self.counts.items()
            if counted_kind == kind and reason in (None, counted_reason)
        )

    def as_json(self) -> dict[str, Any]:
        """For summary.json: {"total": samples of the data set, kind: {reason: samples}}."""
        content: dict[str, Any] = {"total": self.total}
        for (kind, reason), number in sorted(self.counts.items()):
            content.setdefault(kind, {})[reason] = number
        return content

    def report(self) -> str:
        """One line per kind and reason: the number of samples, and the first case."""
        if not self.counts:
            return "no bad, truncated or capped samples"
        lines = [f"{'kind':<10} {'reason':<18} {'samples':>8}  first case"]
        for (kind, reason), number in sorted(self.counts.items()):
            lines.append(f"{kind:<10} {reason:<18} {number:>8}  {self.examples[kind, reason]}")
        return "\n".join(lines)
