"""A JSON list or JSON lines on disk, read one record at a time."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unimoe_jax.data.tally import BadSample

FORM = "expected a JSON list, or one JSON object per line, of records with `conversations`"
"""The end of messages about files of another form."""

_RecordSpan = tuple[int, int, int]
"""(first byte, last byte + 1, line) of a record."""
_SPACE = re.compile(r"\s*")


class RecordFile:
    """Random access to the records of a JSON list or JSON-lines file, by byte range.

    Only offsets and line numbers are kept in memory. Raises ValueError, naming file and line, if
    there is no record, if a JSON list is cut off or does not end the file, for an object that is
    written over several lines, and for UTF-16. A broken line of a JSON-lines file is reported by
    `read`, for that record only.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        data = Path(path).read_bytes()
        self.digest = hashlib.sha256(data).hexdigest()
        # Python's JSON reader would recognise UTF-16, but the byte offsets here would be wrong.
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{self.path}: UTF-16; save it as UTF-8")
        if data[:4096].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
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
        """Return the record at position `number` as parsed JSON.

        Raises `BadSample` ("malformed_json") if it cannot be parsed or is not an object.
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


def _line_spans(data: bytes) -> Iterator[_RecordSpan]:
    """The span of every line that is not empty."""
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


def _check_one_line(data: bytes, spans: list[_RecordSpan], path: str) -> None:
    """Refuse an object that is written over several lines, because each of these lines would count
    as a broken record. Only the first record is checked."""
    if not spans:
        return
    start, end, line = spans[0]
    if _is_json(data[start:end]):
        return
    # The first line is not JSON. See whether the file from there on begins with an object.
    try:
        text = data[start:].decode("utf-8-sig").lstrip()
        _, stop = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return  # a broken record, as any line may be
    last_line = line + text.count("\n", 0, stop)
    if last_line == line:
        return  # an object with text after it on the same line
    raise ValueError(f"{path}: one JSON object over lines {line} to {last_line}; {FORM}")


class _Position:
    """A position in decoded text, with its byte offset in the file and its line number.

    Python's JSON reader counts characters, but a file is read by bytes. `advance` only looks at the
    text since the last position, so the whole file is passed once.
    """

    def __init__(self, text: str, offset: int):
        self.text, self.character, self.byte, self.line = text, 0, offset, 1

    def advance(self, character: int) -> None:
        """Move forward to the character with this index."""
        passed = self.text[self.character : character]
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        self.line += passed.count("\n")
        self.character = character


def _skip_space(text: str, start: int) -> int:
    """Index of the first character from `start` on that is not white space."""
    space = _SPACE.match(text, start)
    return space.end() if space else start


def _list_spans(data: bytes, path: str) -> Iterator[_RecordSpan]:
    """The span of every element of a JSON list.

    Raises:
        ValueError: the list is broken or not the only content of the file; file and line are named.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    decoder = json.JSONDecoder()
    # A byte-order mark is not part of the text.
    position = _Position(text, offset=len(data) - len(text.encode()))
    index = _skip_space(text, text.index("[") + 1)
    is_empty = text[index : index + 1] == "]"
    while not is_empty:
        # Parse one element to find its end.
        position.advance(index)
        start, line = position.byte, position.line
        try:
            _, end = decoder.raw_decode(text, index)
        except (ValueError, RecursionError) as error:
            error_line = text.count("\n", 0, getattr(error, "pos", index)) + 1
            raise ValueError(f"{path}:{error_line}: broken JSON list: {error}") from error
        position.advance(end)
        yield start, position.byte, line
        # A comma leads to the next element, a bracket ends the list.
        index = _skip_space(text, end)
        if text[index : index + 1] == "]":
            break
        if text[index : index + 1] != ",":
            raise ValueError(f"{path}:{position.line}: expected `,` or `]` after a record")
        index = _skip_space(text, index + 1)
    rest = _skip_space(text, index + 1)
    if rest < len(text):
        position.advance(rest)
        raise ValueError(
            f"{path}:{position.line}: text after the list's closing `]`, from byte "
            f"{position.byte} on: {text[rest : rest + 40]!r}; a file must hold one list, so put "
            "all records into it"
        )
