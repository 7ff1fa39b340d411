"""Questions and answers as plain dataclasses, without arrays or models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from unimoe_jax.config import MEDIA, MediaName
from unimoe_jax.data.media.images import IMAGE_SUFFIXES
from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.errors import GenerationError

PLACEHOLDER_ORDER = ("<image>", "<audio>", "<video>")
"""The order of media that the question does not place itself, as in the released programs."""
TURN = ("prompt", "text", *MEDIA)
"""Keys of a questions file that belong to one turn of the user."""


@dataclass(frozen=True)
class Media:
    """An image, a sound, or a video.

    paths: one path; a video may be a file, a folder of frames, or several frames.
    """

    kind: MediaName
    paths: tuple[str, ...]

    def __post_init__(self):
        if self.kind not in MEDIA:
            raise GenerationError(f"media kind {self.kind!r}; allowed: {', '.join(MEDIA)}")
        if isinstance(self.paths, str | os.PathLike):
            raise GenerationError(
                f"{self.kind}: paths is a tuple; write ({os.fspath(self.paths)!r},)"
            )
        try:
            # Readers and messages need text, not Path or bytes.
            object.__setattr__(self, "paths", tuple(os.fsdecode(path) for path in self.paths))
        except TypeError as error:
            raise GenerationError(
                f"{self.kind}: expected a tuple of paths, got {self.paths!r:.60}"
            ) from error
        if not self.paths or (len(self.paths) > 1 and self.kind != "video"):
            raise GenerationError(f"{self.kind}: one file each, got {list(self.paths)}")
        if "" in self.paths:
            raise GenerationError(
                f"{self.kind}: the file name '' is empty; give a path, or no file"
            )


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. Only turns of the user have media.

    text: may hold a placeholder (<image>, <audio>, <video>) for every file, where it belongs.
    """

    role: Literal["user", "assistant"]
    text: str
    media: tuple[Media, ...] = ()


@dataclass(frozen=True)
class Request:
    """A conversation that waits for the assistant's next answer."""

    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)

    def checked(self) -> Request:
        """Return the request if its fields have the right types and its text can be encoded.

        Raises:
            GenerationError: they have not; the message has the number of the turn.
        """
        if not isinstance(self.sampling, Sampling):
            raise GenerationError(f"expected a Sampling, got {self.sampling!r:.60}")
        _check_tuple("messages", self.messages)
        for number, message in enumerate(self.messages):
            if not isinstance(message, Message):
                raise GenerationError(f"message {number}: expected a Message, got {message!r:.60}")
            _check_text(number, message.text)
            _check_tuple(f"message {number}: media", message.media)
            for medium in message.media:
                if not isinstance(medium, Media):
                    raise GenerationError(
                        f"message {number}: expected Media(kind, paths), got {medium!r:.60}"
                    )
        return self


def _check_tuple(name: str, value: Any) -> None:
    """Refuse a value that is not a sequence; a dataclass does not check its types."""
    if not isinstance(value, tuple | list):
        raise GenerationError(f"{name}: expected a tuple, got {value!r:.60}")


def _check_text(number: int, text: Any) -> None:
    """Refuse text that is no string, or that holds bytes which were never valid text."""
    if not isinstance(text, str):
        raise GenerationError(f"message {number}: the text must be a string, not {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"message {number}: character {error.start + 1} of the text, {text[error.start]!r}, is "
            "not valid Unicode; write the text in UTF-8"
        ) from error


def ask(text: str, media: Sequence[Media] = (), sampling: Sampling = Sampling()) -> Request:
    """A request with a single question."""
    # Keep a medium that is not in a list as it is: `Request.checked` reports it.
    media = tuple(media) if isinstance(media, Iterable) else media
    return Request((Message("user", text, media),), sampling)


@dataclass(frozen=True)
class Answer:
    """An answer of the assistant.

    text: the answer without special tokens, stripped.
    tokens: all generated token ids, the final end token included.
    stop: "eos", or "length" if max_new_tokens has cut the answer.
    modality_T: modality of every position of the prompt, see `config.media.MODALITY`.
    expert_LTK: if traced, int32 experts of every MoE layer for every position that was fed to the
        model (the prompt, then all tokens but the last); the number of experts means no expert.
    logits_TV: if traced, float32 logits that each token was chosen from.
    """

    text: str
    tokens: tuple[int, ...]
    stop: Literal["eos", "length"]
    modality_T: Any = field(default=None, compare=False)
    expert_LTK: Any = field(default=None, compare=False)
    logits_TV: Any = field(default=None, compare=False)

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt, soft tokens included."""
        return len(self.modality_T)


# ------------------------------------------------------------------------------------ from JSON


def request_of(content: Mapping[str, Any], root: Path, defaults: Sampling) -> Request:
    """A request from a JSON object of a questions file.

    content: `prompt` (or `text`) with `image`, `video`, `speech`, `audio` (a path or a list; a list
        of images under `video` is one video), or `messages`, a list of `{role, text, image, …}`;
        and any field of `Sampling`.
    root: paths are relative to this folder.
    defaults: settings that the object does not have.

    Raises:
        GenerationError: a key or value is not understood, or two keys exclude each other.
    """
    settings = [f.name for f in fields(Sampling)]
    allowed = ["id", "question_id", "messages", *TURN, *settings]
    if unknown := set(content) - set(allowed):
        raise GenerationError(f"unknown keys {sorted(unknown)}; allowed: {', '.join(allowed)}")
    # Replace only the settings that the question has. Sampling(**…).over(defaults) would replace
    # the seed as well, because the seed of a new Sampling is 0 and not None.
    values = {name: content[name] for name in settings if content.get(name) is not None}
    sampling = replace(defaults, **values)
    if "messages" not in content:
        return Request((_message({"role": "user", **content}, root),), sampling)
    if outside := [key for key in TURN if content.get(key) is not None]:
        raise GenerationError(
            f"messages and {', '.join(outside)}: give one of them; text and media of a "
            "conversation belong inside its messages"
        )
    return Request(_messages(content["messages"], root), sampling)


def _messages(content: Any, root: Path) -> tuple[Message, ...]:
    """The turns of a conversation from the value of `messages`."""
    if not isinstance(content, list) or not all(isinstance(m, Mapping) for m in content):
        raise GenerationError("messages: expected a list of objects")
    for number, message in enumerate(content):
        if unknown := set(message) - {"role", *TURN}:
            raise GenerationError(
                f"message {number}: unknown keys {sorted(unknown)}; allowed: role, "
                f"{', '.join(TURN)}; settings stand beside messages"
            )
    return tuple(_message(message, root) for message in content)


def _message(content: Mapping[str, Any], root: Path) -> Message:
    """One turn from its JSON object."""
    if "text" in content and "prompt" in content:
        raise GenerationError("text and prompt mean the same: give one of them")
    role, text = content.get("role"), content.get("text", content.get("prompt"))
    if role not in ("user", "assistant"):
        raise GenerationError(f"role = {role!r}; allowed: user, assistant")
    if not isinstance(text, str):
        raise GenerationError(f"the text of a turn must be a string, not {text!r:.40}")
    media = [medium for kind in MEDIA for medium in _media(kind, content.get(kind) or [], root)]
    return Message(role, text, tuple(media))


def _media(kind: MediaName, value: Any, root: Path) -> list[Media]:
    """The files of one kind in a turn."""
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list):
        raise GenerationError(f"{kind}: expected a path or a list of paths, got {value!r:.60}")
    if kind == "video" and _are_frames(files):
        files = [files]
    media = []
    for file in files:
        paths: list[Any] = file if kind == "video" and isinstance(file, list) else [file]
        if not paths or not all(isinstance(path, str) for path in paths):
            raise GenerationError(f"{kind}: expected paths, got {file!r:.60}")
        # Check the paths as they were written: joined to the root, '' would not be empty.
        medium = Media(kind, tuple(paths))
        media.append(replace(medium, paths=tuple(str(root / path) for path in paths)))
    return media


def _are_frames(files: list) -> bool:
    """Whether a list under `video` is one video given by its frames, as in the training data."""
    images = [isinstance(file, str) and file.lower().endswith(IMAGE_SUFFIXES) for file in files]
    return len(images) > 1 and all(images)
