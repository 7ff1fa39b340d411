"""What is asked and what is answered: plain dataclasses without arrays or models."""

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
"""Where the released programs put media that the question does not place itself."""
TURN = ("prompt", "text", *MEDIA)
"""Keys of a questions file that say what a user's turn holds."""
"""The largest settings that the arrays of a batch can hold."""


@dataclass(frozen=True)
class Media:
    """One file: an image, a sound, or a video (a file, a folder of frames, or several frames)."""

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
            # Readers and messages take them as text.
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
    """A turn. Media belong to the user's turns; placeholders in the text say where they stand."""

    role: Literal["user", "assistant"]
    text: str
    media: tuple[Media, ...] = ()


@dataclass(frozen=True)
class Request:
    """A conversation that waits for the assistant's next answer."""

    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)

    def checked(self) -> Request:
        """Itself, of the right types and with text that can be encoded.

        Raises:
            GenerationError: the message is numbered.
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


def _check_tuple(what: str, value: Any) -> None:
    if not isinstance(value, tuple | list):
        raise GenerationError(f"{what}: expected a tuple, got {value!r:.60}")


def _check_text(number: int, text: Any) -> None:
    if not isinstance(text, str):
        raise GenerationError(f"message {number}: the text must be a string, not {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"message {number}: character {error.start + 1} of the text, {text[error.start]!r}, is "
            "not valid Unicode; write the text in UTF-8"
        ) from error


def ask(
    text: str, media: Sequence[Media] = (), sampling: Sampling = field(default_factory=Sampling)
) -> Request:
    """A request of one question."""
    # A medium that stands alone is refused with the request's other faults.
    media = tuple(media) if isinstance(media, Iterable) else media
    return Request((Message("user", text, media),), sampling)


@dataclass(frozen=True)
class Answer:
    """text: without special tokens, stripped. tokens: everything generated, the final eos too.

    stop: "eos", or "length" where max_new_tokens cut it. modality_T: of the prompt's positions, see
    `data.batch.MODALITY`. expert_LTK: if traced, the experts in every MoE layer of every position
    that was fed to the model (prompt, then all tokens but the last), int32, E = none. logits_TV: if
    traced, the float32 logits that each token was chosen from.
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
    """A request from an object of a questions file.

    `prompt` (or `text`) with `image`, `video`, `speech`, `audio` (a path or a list; a list of
    images is one video), or `messages`: a list of `{role, text, image, …}`; and any field of
    `Sampling`. Paths are relative to `root`.

    Raises:
        GenerationError: a key or value that is not understood, or keys that exclude each other.
    """
    settings = [f.name for f in fields(Sampling)]
    allowed = ["id", "question_id", "messages", *TURN, *settings]
    if unknown := set(content) - set(allowed):
        raise GenerationError(f"unknown keys {sorted(unknown)}; allowed: {', '.join(allowed)}")
    # Only what the question says: `Sampling` has a seed of its own, which nobody asked for here.
    given = {name: content[name] for name in settings if content.get(name) is not None}
    sampling = replace(defaults, **given)
    if "messages" not in content:
        return Request((_message({"role": "user", **content}, root),), sampling)
    outside = [key for key in TURN if content.get(key) is not None]
    if outside:
        raise GenerationError(
            f"messages and {', '.join(outside)}: give one of them; what belongs to a conversation "
            "stands inside its messages"
        )
    messages = content["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise GenerationError("messages: expected a list of objects")
    for number, message in enumerate(messages):
        if unknown := set(message) - {"role", *TURN}:
            raise GenerationError(
                f"message {number}: unknown keys {sorted(unknown)}; allowed: role, "
                f"{', '.join(TURN)}; settings stand beside messages"
            )
    return Request(tuple(_message(message, root) for message in messages), sampling)


def _message(content: Mapping[str, Any], root: Path) -> Message:
    if "text" in content and "prompt" in content:
        raise GenerationError("text and prompt mean the same: give one of them")
    role, text = content.get("role"), content.get("text", content.get("prompt"))
    if role not in ("user", "assistant"):
        raise GenerationError(f"role = {role!r}; allowed: user, assistant")
    if not isinstance(text, str):
        raise GenerationError(f"the text of a turn must be a string, not {text!r:.40}")
    media = []
    for kind in MEDIA:
        value = content.get(kind) or []
        files = [value] if isinstance(value, str) else value
        if not isinstance(files, list):
            raise GenerationError(f"{kind}: expected a path or a list of paths, got {value!r:.60}")
        if kind == "video" and _are_frames(files):
            files = [files]
        for file in files:
            paths = file if kind == "video" and isinstance(file, list) else [file]
            if not paths or not all(isinstance(path, str) for path in paths):
                raise GenerationError(f"{kind}: expected paths, got {file!r:.60}")
            given = Media(kind, tuple(paths))
            media.append(replace(given, paths=tuple(str(root / path) for path in paths)))
    return Message(role, text, tuple(media))


def _are_frames(files: list) -> bool:
    """Whether a list of videos is one video, given by its frames, as the training data give it."""
    images = [isinstance(file, str) and file.lower().endswith(IMAGE_SUFFIXES) for file in files]
    return len(images) > 1 and all(images)
