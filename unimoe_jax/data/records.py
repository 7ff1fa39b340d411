"""JSON files of conversations -> validated `Record`s (schema of LLaVA and Uni-MoE).

A record is `{"conversations": [{"from": "human"|"gpt", "value": str}, …]}` with optional media:
`image` (path or list of paths), `video` (path of a file or folder, a list of frame images for one
video, or a list of such lists), `voice` (path or list of paths) and `voice_modality` ("speech",
"audio" or a list of them), which overrides the source's setting.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from unimoe_jax.config import MediaName
from unimoe_jax.data.media import frame_files
from unimoe_jax.data.tally import BadSample

Role = Literal["human", "gpt"]
PLACEHOLDERS = {"image": "<image>", "video": "<video>", "voice": "<audio>"}
MISNAMED = {
    "image": ("images",),
    "video": ("videos",),
    "voice": ("voices", "audio", "audios", "speech"),
}
"""Other data sets' keys of media, and those of `generate --input`."""
FORM = "expected a JSON list, or one JSON object per line, of records with `conversations`"


@dataclass(frozen=True)
class MediaFile:
    """One medium of a record. `paths` has several entries only for a video given as frames."""

    modality: MediaName
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """A validated record. `media` maps a placeholder to its files in order of appearance."""

    id: str
    turns: tuple[Turn, ...]
    media: dict[str, tuple[MediaFile, ...]]
    source: str
    line: int


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


class RecordReader:
    """Validates the records of one source: roles, answers, placeholder counts, paths in the root.

    voice: modality of `voice` files, None if the source leaves it open.
    accepts: the media this model has an encoder for.
    """

    def __init__(
        self,
        name: str,
        file: RecordFile,
        root: str | Path,
        voice: MediaName | None,
        accepts: frozenset[MediaName],
    ):
        self.name = name
        self.file = file
        self.root = os.path.realpath(root)
        self.voice = voice
        self.accepts = accepts

    def __len__(self) -> int:
        return len(self.file)

    def line(self, number: int) -> int:
        return int(self.file.lines[number])

    def record(self, number: int) -> Record:
        """The validated record `number`; raises `BadSample`."""
        content = self.file.read(number)
        turns = turns_of(content)
        media = {PLACEHOLDERS[key]: self._files(key, content) for key in PLACEHOLDERS}
        media = {placeholder: files for placeholder, files in media.items() if files}
        _check_counts(turns, media)
        _check_keys(content, turns, media)
        name = content.get("id", content.get("question_id", number))
        return Record(str(name), turns, media, self.name, self.line(number))

    def _files(self, key: str, content: dict) -> tuple[MediaFile, ...]:
        groups = path_groups(key, content.get(key))
        if not groups:
            return ()
        for path in (path for group in groups for path in group):
            _check_unicode(path, key)
        modalities = [key] * len(groups)
        if key == "voice":
            modalities = self._voices(content.get("voice_modality"), len(groups))
        for modality in modalities:
            if modality not in self.accepts:
                raise BadSample(
                    "no_encoder", f"the model has no encoder for {modality} ({key}: {groups[0][0]})"
                )
        return tuple(
            MediaFile(modality, tuple(self._resolve(path, modality) for path in paths))
            for modality, paths in zip(modalities, groups, strict=True)
        )

    def _voices(self, given, number: int) -> list[str]:
        voices = [given] * number if isinstance(given, str) else given
        if voices is None:
            if self.voice is None:
                raise BadSample(
                    "voice_modality",
                    "the model hears speech and audio: set `voice` of the source or the record's "
                    "`voice_modality` to one of them",
                )
            return [self.voice] * number
        valid = isinstance(voices, list) and all(v in ("speech", "audio") for v in voices)
        if not valid or len(voices) != number:
            raise BadSample(
                "voice_modality",
                f"voice_modality must be speech or audio, once or per file; got {given!r}",
            )
        return voices

    def _resolve(self, path: str, modality: MediaName) -> str:
        """The file or folder that is meant; all of it lies in the root."""
        full = self._inside(path)
        if modality == "video" and os.path.isdir(full):
            for frame in frame_files((full,)):
                if os.path.islink(frame):  # the others are where their folder is
                    self._inside(frame)
        return full

    def _inside(self, path: str) -> str:
        if "\0" in path:
            raise BadSample("outside_root", f"a path with a NUL byte: {path!r}")
        named = os.path.join(self.root, path)
        full = os.path.realpath(named)
        if not Path(full).is_relative_to(self.root):
            link = "" if full == os.path.normpath(named) else f", it leads to {full}"
            raise BadSample(
                "outside_root",
                f"{path!r} is outside the data root {self.root}{link}; set the source's `root` to "
                "a folder that holds all its files",
            )
        if not os.path.exists(full):
            raise BadSample("missing_file", f"no such file: {path!r} in {self.root}")
        return full


def path_groups(key: str, value) -> list[tuple[str, ...]]:
    """The paths of each medium declared under `key`."""
    if value is None or value == [] or value == "":
        return []
    if isinstance(value, str):
        return [(value,)]
    if isinstance(value, list) and all(isinstance(path, str) and path for path in value):
        return [tuple(value)] if key == "video" else [(path,) for path in value]
    if key == "video" and isinstance(value, list) and all(isinstance(v, list) for v in value):
        return [group for frames in value for group in path_groups(key, frames)]
    raise BadSample("malformed_record", f"{key}: expected a path or a list of paths: {value!r:.80}")


def _check_unicode(text: str, what: str) -> None:
    """JSON may hold half of a surrogate pair, which is no character: no tokenizer and no file
    system can take it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(
            "lone_surrogate",
            f"{what}: {text[error.start]!a} at character {error.start} is half of a pair",
        ) from error


def turns_of(content: dict) -> tuple[Turn, ...]:
    """Questions and answers in turn; raises `BadSample` where they are not."""
    conversations = content.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        keys = ", ".join(map(ascii, content)) or "nothing"
        problem = "`conversations` is missing or empty"
        if "conversations" not in content:
            wraps = any(isinstance(value, list) for value in content.values())
            problem = f"no `conversations`, only {keys:.80}{f'; {FORM}' if wraps else ''}"
        raise BadSample("malformed_record", problem)
    turns = []
    for number, turn in enumerate(conversations):
        known = isinstance(turn, dict) and turn.get("from") in ("human", "gpt")
        if not known or not isinstance(turn.get("value"), str):
            raise BadSample(
                "malformed_record",
                f"conversations[{number}] needs `from` (human or gpt) and a string `value`",
            )
        _check_unicode(turn["value"], f"conversations[{number}]")
        if turns or turn["from"] == "human":  # leading turns of the assistant are dropped
            turns.append(Turn(turn["from"], turn["value"]))
    for number, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[number % 2]:
            raise BadSample("roles", f"roles must alternate; turn {number} is {turn.role}")
        if turn.role == "gpt" and not turn.text.strip():
            raise BadSample("empty_answer", f"turn {number} is an empty answer")
    if len(turns) < 2 or len(turns) % 2:
        raise BadSample("roles", "the conversation does not end with an answer")
    return tuple(turns)


def _check_counts(turns: tuple[Turn, ...], media: dict[str, tuple[MediaFile, ...]]) -> None:
    """A placeholder whose medium is not declared is ordinary text; declared ones must match."""
    for placeholder, files in media.items():
        found = _count(placeholder, turns)
        if found != len(files):
            told = f"{found} {placeholder} for {len(files)} declared file(s)"
            if any(len(file.paths) > 1 for file in files):
                told += "; paths in one list are one video's frames, [[path], [path]] two videos"
            raise BadSample("placeholder_count", told)


def _check_keys(
    content: dict, turns: tuple[Turn, ...], media: dict[str, tuple[MediaFile, ...]]
) -> None:
    """Without its medium a sample would be learned as text, and nobody be told."""
    for key, placeholder in PLACEHOLDERS.items():
        given = [other for other in MISNAMED[key] if content.get(other)]
        if given and placeholder not in media and _count(placeholder, turns):
            raise BadSample(
                "malformed_record", f"{placeholder} without `{key}`; rename `{given[0]}` to it"
            )


def _count(placeholder: str, turns: tuple[Turn, ...]) -> int:
    return sum(turn.text.count(placeholder) for turn in turns if turn.role == "human")
