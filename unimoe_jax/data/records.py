"""JSON files of conversations -> validated `Record`s (schema of LLaVA and Uni-MoE).

A record is `{"conversations": [{"from": "human"|"gpt", "value": str}, …]}` with optional media:
`image` (path or list of paths), `video` (path of a file or folder, a list of frame images for one
video, or a list of such lists), `voice` (path or list of paths) and `voice_modality` ("speech",
"audio" or a list of them), which overrides the source's setting.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unimoe_jax.config.media import MISSPELT_KEYS, RECORD_PLACEHOLDERS, MediaName
from unimoe_jax.data.media.videos import frame_files
from unimoe_jax.data.record_files import FORM, RecordFile
from unimoe_jax.data.tally import BadSample

Role = Literal["human", "gpt"]


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
        media = {RECORD_PLACEHOLDERS[key]: self._files(key, content) for key in RECORD_PLACEHOLDERS}
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
    for key, placeholder in RECORD_PLACEHOLDERS.items():
        given = [other for other in MISSPELT_KEYS[key] if content.get(other)]
        if given and placeholder not in media and _count(placeholder, turns):
            raise BadSample(
                "malformed_record", f"{placeholder} without `{key}`; rename `{given[0]}` to it"
            )


def _count(placeholder: str, turns: tuple[Turn, ...]) -> int:
    return sum(turn.text.count(placeholder) for turn in turns if turn.role == "human")
