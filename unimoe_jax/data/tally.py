"""What went wrong while reading data, counted: bad samples by reason, truncations, capped chunks.

Workers cannot share counters, so every loaded batch carries its `Event`s and the main process adds
them up here.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

log = logging.getLogger("unimoe_jax.data")
# What every process of a run meets alike; one of them tells (see `distributed.initialize`).
index_log = logging.getLogger("unimoe_jax.data.index")

MIN_SEEN = 1000
"""The bad share is judged over at least so many samples (or all there are)."""


MOST_TOLD = 50
"""Samples of one kind and reason that are logged."""


class BadSample(Exception):
    """A record that cannot be trained on. `reason` is a short key, `message` names the culprit."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self):
        return BadSample, (self.reason, self.message)


class TooManyBadSamples(RuntimeError):
    """More bad samples than `loader.max_bad_share` allows (or any, with `loader.strict`)."""


@dataclass(frozen=True)
class Event:
    """One thing worth counting. `kind` "bad" skips the sample; the others changed it.

    record: its place in the file, from 1; line: where it begins, which many records of a JSON list
    may have in common.
    """

    kind: Literal["bad", "truncated", "capped"]
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
    """Counts of a pipeline. Every sample is counted once per reason, the first ones are logged.

    total: samples of the data set, good and bad; loaded: samples read for batches so far.
    """

    total: int
    max_bad_share: float
    strict: bool = False
    loaded: int = 0
    counts: Counter = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    _met: set = field(default_factory=set)
    _met_loading: list = field(default_factory=list)
    _bad_loads: int = 0

    def add(self, events: list[Event], loaded: int = 0) -> None:
        """Count `events`, met while loading `loaded` samples (0: while indexing).

        Raises `TooManyBadSamples`, with a table, when bad samples pass the allowed share of the
        data set or of what was loaded so far; with `strict` at the first.
        """
        self.loaded += loaded
        for event in events:
            key = (event.source, event.file, event.record, event.kind, event.reason)
            if key in self._met:
                continue
            told = f"{event.where}: {event.message}"
            self._count(key, told)
            if loaded:
                self._met_loading.append(key)
            self._tell(event, told, log if loaded else index_log)
            if event.kind == "bad":
                self._bad_loads += loaded > 0
                if self.strict:
                    raise TooManyBadSamples(f"{told} ({event.reason}; strict)")
        self._check(self.bad, self.total, "of the data set")
        seen = max(min(self.loaded, self.total), min(self.total, MIN_SEEN))
        self._check(self._bad_loads, seen, "loaded")

    def _count(self, key: tuple, told: str) -> None:
        self._met.add(key)
        self.counts[key[-2:]] += 1
        self.examples.setdefault(key[-2:], told)

    def as_text(self) -> str:
        """What `join` needs of another tally of the same data; while indexing all meet the same."""
        examples = [[*kind, told] for kind, told in self.examples.items()]
        return json.dumps({"met": self._met_loading, "examples": examples})

    def join(self, text: str) -> None:
        """Count what another process, or an earlier sitting of the run, has met too; it loads other
        samples, in later epochs the same.

        The shares that are allowed are each tally's own.
        """
        other = json.loads(text)
        examples = {(kind, reason): told for kind, reason, told in other["examples"]}
        for key in map(tuple, other["met"]):
            if key not in self._met:
                self._count(key, examples[key[-2:]])

    def _tell(self, event: Event, told: str, teller: logging.Logger) -> None:
        number = self.counts[event.kind, event.reason]
        level = logging.WARNING if event.kind == "bad" else logging.INFO
        if number <= MOST_TOLD:
            teller.log(level, "%s (%s: %s)", told, event.kind, event.reason)
        if number == MOST_TOLD:  # a wrong file has a bad sample on every line
            teller.log(level, "more of these (%s: %s) are only counted", event.kind, event.reason)

    def _check(self, bad: int, base: int, of_what: str) -> None:
        if bad > self.max_bad_share * base:
            raise TooManyBadSamples(
                f"{bad} of {base} samples {of_what} are bad ({bad / max(base, 1):.2%}, allowed "
                f"{self.max_bad_share:.2%})\n{self.table()}"
            )

    @property
    def bad(self) -> int:
        """Distinct bad samples."""
        return sum(count for (kind, _), count in self.counts.items() if kind == "bad")

    def count(self, kind: str, reason: str | None = None) -> int:
        """Distinct samples of a kind, of one reason or of all."""
        return sum(
            number
            for (a_kind, a_reason), number in self.counts.items()
            if a_kind == kind and reason in (None, a_reason)
        )

    def as_json(self) -> dict[str, Any]:
        """For summary.json: {"total": samples of the data set, kind: {reason: samples}}."""
        found: dict[str, Any] = {"total": self.total}
        for (kind, reason), number in sorted(self.counts.items()):
            found.setdefault(kind, {})[reason] = number
        return found

    def table(self) -> str:
        """One line per kind and reason: how often, and the first case."""
        if not self.counts:
            return "no bad, truncated or capped samples"
        lines = [f"{'kind':<10} {'reason':<18} {'samples':>8}  first case"]
        for (kind, reason), number in sorted(self.counts.items()):
            lines.append(f"{kind:<10} {reason:<18} {number:>8}  {self.examples[kind, reason]}")
        return "\n".join(lines)
