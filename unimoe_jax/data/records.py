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
from typing import Any, Literal, cast

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
    """One question ("human") or answer ("gpt")."""

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
        self.voice: MediaName | None = voice
        self.accepts = accepts

    def __len__(self) -> int:
        return len(self.file)

    def line(self, number: int) -> int:
        """The line of the file on which record `number` begins."""
        return int(self.file.lines[number])

    def record(self, number: int) -> Record:
        """Return the validated record `number`; raises `BadSample`."""
        content = self.file.read(number)
        turns = turns_of(content)
        media = {RECORD_PLACEHOLDERS[key]: self._files(key, content) for key in RECORD_PLACEHOLDERS}
        media = {placeholder: files for placeholder, files in media.items() if files}
        _check_counts(turns, media)
        _check_keys(content, turns, media)
        # Records for training have an `id`, records of question files a `question_id`.
        name = content.get("id", content.get("question_id", number))
        return Record(str(name), turns, media, self.name, self.line(number))

    def _files(self, key: str, content: dict) -> tuple[MediaFile, ...]:
        """The files that a record declares under `key`, each with its modality."""
        groups = path_groups(key, content.get(key))
        if not groups:
            return ()
        # Python cannot pass half of a surrogate pair to the file system.
        for path in (path for group in groups for path in group):
            _check_unicode(path, key)
        # `image` and `video` are modalities; `voice` files are speech or audio.
        modalities: list[MediaName]
        if key == "voice":
            modalities = self._voice_modalities(content.get("voice_modality"), len(groups))
        else:
            modalities = [cast(MediaName, key)] * len(groups)
        for modality in modalities:
            if modality not in self.accepts:
                raise BadSample(
                    "no_encoder", f"the model has no encoder for {modality} ({key}: {groups[0][0]})"
                )
        return tuple(
            MediaFile(modality, tuple(self._resolve(path, modality) for path in paths))
            for modality, paths in zip(modalities, groups, strict=True)
        )

    def _voice_modalities(self, setting: Any, number: int) -> list[MediaName]:
        """The modality of each of `number` voice files. setting: the record's `voice_modality`."""
        if setting is None:
            if self.voice is None:
                raise BadSample(
                    "voice_modality",
                    "the model hears speech and audio: set `voice` of the source or the record's "
                    "`voice_modality` to one of them",
                )
            return [self.voice] * number
        voices: Any = [setting] * number if isinstance(setting, str) else setting
        valid = isinstance(voices, list) and all(v in ("speech", "audio") for v in voices)
        if not valid or len(voices) != number:
            raise BadSample(
                "voice_modality",
                f"voice_modality must be speech or audio, once or per file; got {setting!r}",
            )
        return voices

    def _resolve(self, path: str, modality: MediaName) -> str:
        """The real path of a file or folder, which must be inside the data root with all its
        frames."""
        full = self._inside(path)
        if modality == "video" and os.path.isdir(full):
            for frame in frame_files((full,)):
                # A frame that is not a link is where its folder is, inside the root.
                if os.path.islink(frame):
                    self._inside(frame)
        return full

    def _inside(self, path: str) -> str:
        """The real path of an existing file or folder inside the data root; links are followed."""
        if "\0" in path:
            raise BadSample("outside_root", f"a path with a NUL byte: {path!r}")
        unresolved = os.path.join(self.root, path)
        full = os.path.realpath(unresolved)
        if not Path(full).is_relative_to(self.root):
            link = "" if full == os.path.normpath(unresolved) else f", it leads to {full}"
            raise BadSample(
                "outside_root",
                f"{path!r} is outside the data root {self.root}{link}; set the source's `root` to "
                "a folder that holds all its files",
            )
        if not os.path.exists(full):
            raise BadSample("missing_file", f"no such file: {path!r} in {self.root}")
        return full


def path_groups(key: str, value: Any) -> list[tuple[str, ...]]:
    """Return the paths of each medium that a record declares under `key`.

    Example: two paths under `image` are two media of one path, [("a.png",), ("b.png",)]; under
    `video` they are the frames of one video, [("a.png", "b.png")].
    """
    if value is None or value == [] or value == "":
        return []
    if isinstance(value, str):
        return [(value,)]
    if isinstance(value, list) and all(isinstance(path, str) and path for path in value):
        return [tuple(value)] if key == "video" else [(path,) for path in value]
    if key == "video" and isinstance(value, list) and all(isinstance(v, list) for v in value):
        return [group for frames in value for group in path_groups(key, frames)]
    raise BadSample("malformed_record", f"{key}: expected a path or a list of paths: {value!r:.80}")


def _check_unicode(text: str, name: str) -> None:
    """Refuse half of a surrogate pair, which JSON allows: it is no character, so no tokenizer and
    no file system accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(
            "lone_surrogate",
            f"{name}: {text[error.start]!a} at character {error.start} is half of a pair",
        ) from error


def turns_of(content: dict) -> tuple[Turn, ...]:
    """Return questions and answers in turn; raise `BadSample` if they do not alternate."""
    turns: list[Turn] = []
    for number, turn in enumerate(_conversations(content)):
        is_known = isinstance(turn, dict) and turn.get("from") in ("human", "gpt")
        if not is_known or not isinstance(turn.get("value"), str):
            raise BadSample(
                "malformed_record",
                f"conversations[{number}] needs `from` (human or gpt) and a string `value`",
            )
        _check_unicode(turn["value"], f"conversations[{number}]")
        # Leading turns of the assistant are dropped.
        if turns or turn["from"] == "human":
            turns.append(Turn(turn["from"], turn["value"]))
    # What is left must be question, answer, question, answer, ...
    for number, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[number % 2]:
            raise BadSample("roles", f"roles must alternate; turn {number} is {turn.role}")
        if turn.role == "gpt" and not turn.text.strip():
            raise BadSample("empty_answer", f"turn {number} is an empty answer")
    if len(turns) < 2 or len(turns) % 2:
        raise BadSample("roles", "the conversation does not end with an answer")
    return tuple(turns)


def _conversations(content: dict) -> list:
    """The value of `conversations`; raises `BadSample` if there is none."""
    conversations = content.get("conversations")
    if isinstance(conversations, list) and conversations:
        return conversations
    problem = "`conversations` is missing or empty"
    if "conversations" not in content:
        keys = ", ".join(map(ascii, content)) or "nothing"
        # An object that holds a list is probably the whole data set, wrapped in one object.
        has_list = any(isinstance(value, list) for value in content.values())
        problem = f"no `conversations`, only {keys:.80}{f'; {FORM}' if has_list else ''}"
    raise BadSample("malformed_record", problem)


def _check_counts(turns: tuple[Turn, ...], media: dict[str, tuple[MediaFile, ...]]) -> None:
    """Check that there are as many placeholders as declared files of each kind.

    A placeholder of a kind for which the record declares no file is ordinary text.
    """
    for placeholder, files in media.items():
        count = _count(placeholder, turns)
        if count != len(files):
            message = f"{count} {placeholder} for {len(files)} declared file(s)"
            if any(len(file.paths) > 1 for file in files):
                message += "; paths in one list are one video's frames, [[path], [path]] two videos"
            raise BadSample("placeholder_count", message)


def _check_keys(
    content: dict, turns: tuple[Turn, ...], media: dict[str, tuple[MediaFile, ...]]
) -> None:
    """Refuse a record that declares its media under the key of another data set.

    Its placeholders would be learned as ordinary text, without any message.
    """
    for key, placeholder in RECORD_PLACEHOLDERS.items():
        misspelt = [other for other in MISSPELT_KEYS[key] if content.get(other)]
        if misspelt and placeholder not in media and _count(placeholder, turns):
            raise BadSample(
                "malformed_record", f"{placeholder} without `{key}`; rename `{misspelt[0]}` to it"
            )


def _count(placeholder: str, turns: tuple[Turn, ...]) -> int:
    """How often a placeholder occurs in the questions."""
    return sum(turn.text.count(placeholder) for turn in turns if turn.role == "human")
