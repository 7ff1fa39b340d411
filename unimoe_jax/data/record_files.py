"""A JSON list or JSON lines on disk, read one record at a time."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from unimoe_jax.data.tally import BadSample

FORM = "expected a JSON list, or one JSON object per line, of records with `conversations`"


class RecordFile:
    """Random access to the records of a JSON list or JSON-lines file, by byte range.

    Only offsets and line numbers are held. Raises ValueError, naming file and line, if there is no
    record, where a JSON list breaks off or does not end the file, for an object of several lines
    and for UTF-16; a broken line of a JSON-lines file is reported by `read` for that record only.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        data = Path(path).read_bytes()
        self.digest = hashlib.sha256(data).hexdigest()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # json would guess it
            raise ValueError(f"{self.path}: UTF-16; save it as UTF-8")
        if data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            spans = list(_list_spans(data, self.path))
        else:
            spans = list(_line_spans(data))
            _check_one_line(data, spans, self.path)
        if not spans:
            raise ValueError(f"{self.path}: no record in it; {FORM}")
        table = np.array(spans, np.int64).reshape(-1, 3)
        self.starts, self.ends, self.lines = table.T.copy()

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, number: int) -> dict:
        """The record at position `number` as parsed JSON.

        Raises `BadSample` ("malformed_json") if it does not parse or is no object.
        """
        start, end = int(self.starts[number]), int(self.ends[number])
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample("malformed_json", f"not JSON: {error}") from error
        if not isinstance(value, dict):
            raise BadSample("malformed_json", f"a record must be an object, not {value!r:.40}")
        return value


def _line_spans(data: bytes):
    start = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if line.strip():
            yield start, start + len(line), number
        start += len(line)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _check_one_line(data: bytes, spans: list[tuple[int, int, int]], path: str) -> None:
    """Refuse an object written over several lines, each of which would count as a broken record."""
    if not spans:
        return
    start, end, line = spans[0]
    if _is_json(data[start:end]):
        return
    try:
        text = data[start:].decode("utf-8-sig").lstrip()
        _, stop = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return  # a broken record, as any line may be
    last = line + text.count("\n", 0, stop)
    if last == line:
        return
    raise ValueError(f"{path}: one JSON object over lines {line} to {last}; {FORM}")


def _list_spans(data: bytes, path: str):
    """(first byte, last byte + 1, line) of every element of a JSON list."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    decoder = json.JSONDecoder()
    gap = re.compile(r"\s*")
    offset = len(data) - len(text.encode())  # a byte-order mark
    line, done = 1, 0

    def advance(to: int):
        nonlocal offset, line, done
        passed = text[done:to]
        offset += len(passed) if passed.isascii() else len(passed.encode())
        line += passed.count("\n")
        done = to

    at = gap.match(text, text.index("[") + 1).end()
    empty = text[at : at + 1] == "]"
    while not empty:
        advance(at)
        start, first_line = offset, line
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line_number = text.count("\n", 0, getattr(error, "pos", at)) + 1
            raise ValueError(f"{path}:{line_number}: broken JSON list: {error}") from error
        advance(end)
        yield start, offset, first_line
        at = gap.match(text, end).end()
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise ValueError(f"{path}:{line}: expected `,` or `]` after a record")
        at = gap.match(text, at + 1).end()
    rest = gap.match(text, at + 1).end()
    if rest < len(text):
        advance(rest)
        raise ValueError(
            f"{path}:{line}: text after the list's closing `]`, from byte {offset} on: "
            f"{text[rest : rest + 40]!r}; a file holds one list: put all records into it"
        )
