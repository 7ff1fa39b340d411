"""The sizes of all records of a source, measured once and kept on disk.

Measuring tokenises the text and reads the headers of the media; it decodes nothing. The name of the
file contains a digest of the JSON file and of every setting that changes a size, so an outdated
index is never used. Bad records are measured again each time, because their media may have been
repaired since.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from unimoe_jax.config.media import MEDIA
from unimoe_jax.data.samples import SampleReader, SampleSize
from unimoe_jax.data.tally import BadSample, Event

log = logging.getLogger("unimoe_jax.data")

FORMAT = 4
"""Version of the file format; part of the digest in the name of the file."""
BLOCK = 256
"""Records that a thread measures before it takes the next block."""


@dataclass
class SampleIndex:
    """The sizes of n records, good and bad.

    good bool [n]; tokens, labels int32 [n]; entries int32 [n, 4] in the order of `MEDIA`; whole
    bool [n]. The sizes of a bad record are 0. events: bad, truncated and capped records. digest:
    SHA-256 of the JSON file.
    """

    good: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    entries: np.ndarray
    whole: np.ndarray
    events: list[Event]
    digest: str

    @classmethod
    def empty(cls, count: int, digest: str) -> SampleIndex:
        """An index of `count` records of which none has been measured yet."""
        return cls(
            good=np.zeros(count, bool),
            tokens=np.zeros(count, np.int32),
            labels=np.zeros(count, np.int32),
            entries=np.zeros((count, len(MEDIA)), np.int32),
            whole=np.zeros(count, bool),
            events=[],
            digest=digest,
        )

    def without_events(self) -> SampleIndex:
        """The same index (sharing its arrays) without events."""
        return replace(self, events=[])

    def size(self, number: int) -> SampleSize:
        """The size of record `number`."""
        return SampleSize(
            tokens=int(self.tokens[number]),
            labels=int(self.labels[number]),
            entries=tuple(self.entries[number].tolist()),
            whole=bool(self.whole[number]),
        )

    def store(self, number: int, size: SampleSize) -> None:
        """Mark record `number` as good and store its size."""
        self.good[number] = True
        self.tokens[number] = size.tokens
        self.labels[number] = size.labels
        self.entries[number] = size.entries
        self.whole[number] = size.whole


def build_index(reader: SampleReader, cache: str | Path | None, threads: int = 4) -> SampleIndex:
    """Return the index of a source: read from the folder `cache` if it is there, else measured and
    stored there."""
    path = Path(cache) / f"index-{_key(reader)}.npz" if cache else None
    index = _read(path, reader) if path and path.is_file() else None
    if index:
        # Bad records are measured again, which finds their events again if they are still bad.
        numbers = np.flatnonzero(~index.good)
        index.events = [event for event in index.events if event.kind != "bad"]
    else:
        index = SampleIndex.empty(len(reader), reader.records.file.digest)
        numbers = np.arange(len(reader))
    start = time.perf_counter()
    _measure(reader, index, numbers, threads)
    if len(numbers):
        seconds = time.perf_counter() - start
        log.info("%s: indexed %d records in %.1f s", reader.records.name, len(numbers), seconds)
    if path and len(numbers):
        _write(path, index)
    return index


def _measure(reader: SampleReader, index: SampleIndex, numbers: np.ndarray, threads: int) -> None:
    """Measure the records `numbers` in threads and store their sizes and events in `index`."""

    def measure_block(block: list[int]) -> list[tuple[SampleSize | None, list[Event]]]:
        results: list[tuple[SampleSize | None, list[Event]]] = []
        for number in block:
            try:
                results.append(reader.measure(number))
            except BadSample as bad:
                event = reader.event(number, "bad", bad.reason, bad.message)
                results.append((None, [event]))
        return results

    blocks = [numbers[start : start + BLOCK].tolist() for start in range(0, len(numbers), BLOCK)]
    with ThreadPoolExecutor(threads) as pool:
        # The results are stored in the order of the records, so events come in the same order on
        # every process.
        for block, results in zip(blocks, pool.map(measure_block, blocks), strict=True):
            for number, (size, events) in zip(block, results, strict=True):
                index.events += events
                if size is not None:
                    index.store(number, size)


def _key(reader: SampleReader) -> str:
    """A digest of everything that could change a size."""
    model = reader.processors.model
    # Chunking decides how many pool entries a sound file has.
    sound = {
        name: branch.model_dump(include={"chunk_seconds", "chunk_stride", "max_chunks"})
        for name, branch in (("speech", model.speech), ("audio", model.audio))
        if branch
    }
    settings = {
        "format": FORMAT,
        "json": reader.records.file.digest,
        "file": reader.records.file.path,
        "name": reader.records.name,
        "root": reader.records.root,
        "voice": reader.records.voice,
        "template": reader.template,
        "max_length": reader.max_length,
        "tokenizer": reader.tokenizer.fingerprint,
        "tokens": reader.per_entry,
        "sound": sound,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def _write(path: Path, index: SampleIndex) -> None:
    """Write the index under a temporary name and rename it, so that `path` is always complete.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    events = json.dumps([asdict(event) for event in index.events]).encode()
    # A process number does not make the name unique: in a container every program has number 1.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(
                file,
                good=index.good,
                tokens=index.tokens,
                labels=index.labels,
                entries=index.entries,
                whole=index.whole,
                events=np.frombuffer(events, np.uint8),
            )
        partial.replace(path)
    except OSError as error:
        # An error while writing into an open file has no file name yet.
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, reader: SampleReader) -> SampleIndex | None:
    """Return the stored index; None, with a line in the log, if the file is damaged."""
    count, digest = len(reader), reader.records.file.digest
    try:
        # Open the file here, because numpy would leave it open if it is no archive.
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            index = SampleIndex(
                good=file["good"],
                tokens=file["tokens"],
                labels=file["labels"],
                entries=file["entries"],
                whole=file["whole"],
                events=[Event(**event) for event in json.loads(file["events"].tobytes())],
                digest=digest,
            )
        arrays = index.good, index.tokens, index.labels, index.whole
        if any(array.shape != (count,) for array in arrays) or (
            index.entries.shape != (count, len(MEDIA))
        ):
            raise ValueError("it is the index of other records")
    # A truncated or overwritten archive makes its readers raise almost any exception.
    except Exception as error:
        log.warning(
            "%s: damaged index (%s: %s); source %s is measured again",
            path,
            type(error).__name__,
            error,
            reader.records.name,
        )
        return None
    return index


def none_usable(readers: Sequence[SampleReader], indices: Sequence[SampleIndex]) -> str:
    """Return the message for a mixture without any good record: the first fault of each source."""
    faults = []
    for reader, index in zip(readers, indices, strict=True):
        first = next(event for event in index.events if event.kind == "bad")
        fault = f"{first.where}: {first.message}"
        faults.append(f"{first.source}, {len(reader)} bad record(s), the first {fault}")
    return f"no usable sample in {'; '.join(faults)}"
