"""Sizes of all records of a source, read once and kept on disk.

Text is tokenised and media headers are read; nothing is decoded. The file is keyed by the content
of the JSON and by every setting that changes a size, so a stale one is never used. Records that
were bad are looked at again each time, in case their media have been repaired.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from unimoe_jax.config.media import MEDIA
from unimoe_jax.data.samples import SampleReader, SampleSize
from unimoe_jax.data.tally import BadSample, Event

log = logging.getLogger("unimoe_jax.data")

FORMAT = 4
BLOCK = 256
"""Records handed to a thread at a time."""


@dataclass
class SampleIndex:
    """good bool [n]; tokens, labels int32 [n]; entries int32 [n, 4] in the order of `MEDIA`;
    whole bool [n].

    digest: SHA-256 of the JSON file.
    """

    good: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    entries: np.ndarray
    whole: np.ndarray
    events: list[Event]
    digest: str

    def size(self, number: int) -> SampleSize:
        entries = tuple(self.entries[number].tolist())
        whole = bool(self.whole[number])
        return SampleSize(int(self.tokens[number]), int(self.labels[number]), entries, whole)


def build_index(reader: SampleReader, cache: str | Path | None, threads: int = 4) -> SampleIndex:
    """The index of a source, from `cache` (a folder) if it is there, else measured and stored."""
    path = Path(cache) / f"index-{_key(reader)}.npz" if cache else None
    index = _read(path, reader) if path and path.is_file() else None
    if index:
        numbers = np.flatnonzero(~index.good)
        index.events = [event for event in index.events if event.kind != "bad"]
    else:
        count = len(reader)
        index = SampleIndex(
            np.zeros(count, bool),
            np.zeros(count, np.int32),
            np.zeros(count, np.int32),
            np.zeros((count, len(MEDIA)), np.int32),
            np.zeros(count, bool),
            [],
            reader.records.file.digest,
        )
        numbers = np.arange(count)
    start = time.perf_counter()
    _measure(reader, index, numbers, threads)
    if len(numbers):
        seconds = time.perf_counter() - start
        log.info("%s: indexed %d records in %.1f s", reader.records.name, len(numbers), seconds)
    if path and len(numbers):
        _write(path, index)
    return index


def _measure(reader: SampleReader, index: SampleIndex, numbers: np.ndarray, threads: int) -> None:
    def block(numbers: list[int]):
        results = []
        for number in numbers:
            try:
                results.append(reader.measure(number))
            except BadSample as bad:
                event = reader.event(number, "bad", bad.reason, bad.message)
                results.append((None, [event]))
        return results

    blocks = [numbers[start : start + BLOCK].tolist() for start in range(0, len(numbers), BLOCK)]
    with ThreadPoolExecutor(threads) as pool:
        for block_numbers, results in zip(blocks, pool.map(block, blocks), strict=True):
            for number, (size, events) in zip(block_numbers, results, strict=True):
                index.events += events
                if size is not None:
                    index.good[number] = True
                    index.tokens[number], index.labels[number] = size.tokens, size.labels
                    index.entries[number], index.whole[number] = size.entries, size.whole


def _key(reader: SampleReader) -> str:
    """Changes with anything that could change a size."""
    model = reader.processors.model
    sound = {
        name: part.model_dump(include={"chunk_seconds", "chunk_stride", "max_chunks"})
        for name, part in (("speech", model.speech), ("audio", model.audio))
        if part
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
    path.parent.mkdir(parents=True, exist_ok=True)
    events = json.dumps([asdict(event) for event in index.events]).encode()
    # Processes of several hosts may have the same number: in a container each is 1.
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
        error.filename = error.filename or str(path)  # of an open file it is not known
        raise
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, reader: SampleReader) -> SampleIndex | None:
    """The stored index; None, with a line in the log, if the file is damaged."""
    try:
        # Opened here, because numpy leaves a file open that is no archive.
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            events = [Event(**event) for event in json.loads(file["events"].tobytes())]
            arrays = [file[name] for name in ("good", "tokens", "labels", "entries", "whole")]
        count = len(reader)
        shapes = [(count,)] * 3 + [(count, len(MEDIA)), (count,)]
        if [array.shape for array in arrays] != shapes:
            raise ValueError("it is of other records")
    except Exception as error:  # whatever a cut or overwritten archive provokes in its readers
        log.warning(
            "%s: damaged (%s: %s); source %s is measured again",
            *(path, type(error).__name__, error, reader.records.name),
        )
        return None
    return SampleIndex(*arrays, events, reader.records.file.digest)


def none_usable(readers: Sequence[SampleReader], indices: Sequence[SampleIndex]) -> str:
    """What to say when no source of a mixture has a good record: the first fault of each."""
    parts = []
    for reader, index in zip(readers, indices, strict=True):
        first = next(event for event in index.events if event.kind == "bad")
        fault = f"{first.where}: {first.message}"
        parts.append(f"{first.source}, {len(reader)} bad record(s), the first {fault}")
    return f"no usable sample in {'; '.join(parts)}"
