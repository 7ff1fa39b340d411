"""Media files -> soft tokens, each encoded once and remembered while it is asked about again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.config import MediaName, ModelConfig
from unimoe_jax.data.batch import entry_shapes
from unimoe_jax.data.media.videos import frame_files
from unimoe_jax.data.processors import Entries, Processors
from unimoe_jax.data.records import MediaFile
from unimoe_jax.data.tally import BadSample
from unimoe_jax.generate.engine.program_cache import ProgramCache
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.models.branches import Audio, Pictures, Speech, Vision
from unimoe_jax.nn.linear import LayerOptions

REMEMBERED = 32


class MediaEncoder:
    """Runs the encoders and connectors of a model, one pool entry per device at a time.

    params: {vision|speech|audio: parameters}, on the devices.
    """

    def __init__(
        self,
        model: ModelConfig,
        options: LayerOptions,
        params: dict[str, Any],
        programs: ProgramCache,
    ):
        self.model, self.options, self.params = model, options, params
        self.processors = Processors(model)
        self.programs = programs
        self._remembered: OrderedDict[Any, np.ndarray] = OrderedDict()

    # ------------------------------------------------------------------------------- files

    def count(self, file: MediaFile) -> int:
        """Soft tokens of a file, from its header.

        Raises:
            GenerationError: it is missing, hostile or unreadable, or longer than the model hears.
        """
        with _named(file):
            _key(file)
            entries, found = self.processors.count(file)
        self._check_length(file, entries, found)
        return entries * self.model.tokens_per_medium()[file.modality]

    def _check_length(self, file: MediaFile, entries: int, found: int) -> None:
        if found > entries:
            seconds = getattr(self.model, file.modality).chunk_seconds
            raise GenerationError(
                f"{file.paths[0]}: {found} chunks of {seconds} s; this model takes {entries}; "
                f"shorten the file or raise max_chunks of the model's {file.modality} settings"
            )

    def encode(self, files: Sequence[MediaFile]) -> list[np.ndarray]:
        """Soft tokens [n,D] of each file.

        Raises:
            GenerationError: as `count`, and what only decoding shows.
        """
        soft = []
        for file in files:
            with _named(file):
                key = _key(file)
            # What another thread forgets meanwhile is held here.
            found = self._remembered.pop(key, None)
            soft.append(self._encoded(file) if found is None else found)
            self._remembered[key] = soft[-1]
        while len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)
        return soft

    def warm_up(self, files: Iterable[MediaFile]) -> None:
        """Compile what encodes these."""
        for kind in sorted({"image" if self._frames(f) else f.modality for f in files}):
            self.program(kind)

    def _frames(self, file: MediaFile) -> list[MediaFile]:
        """The images of a video whose frames are given, unless the video program takes as many."""
        if file.modality != "video":
            return []
        with _named(file):
            paths = frame_files(file.paths)
        if len(paths) == self.model.vision.frames:
            return []
        return [MediaFile("image", (path,)) for path in paths]

    def _encoded(self, file: MediaFile) -> np.ndarray:
        """Soft tokens; of frames that somebody chose all count, as in the originals."""
        frames = self._frames(file)
        if not frames:
            return self._loaded(file)
        total = np.float32(0)
        for frame in frames:
            soft = self._loaded(frame)
            total = total + soft.astype(np.float32)
        return (total / np.float32(len(frames))).astype(soft.dtype)

    def _loaded(self, file: MediaFile) -> np.ndarray:
        with _named(file):
            entries = self.processors.load(file)
        # Headers may promise less than there is.
        self._check_length(file, len(entries.arrays), entries.found)
        return self._soft_tokens(file.modality, entries)

    # ---------------------------------------------------------------------------- programs

    def _soft_tokens(self, kind: MediaName, entries: Entries) -> np.ndarray:
        rows = self.programs.rows
        program, done = self.program(kind), []
        for start in range(0, len(entries.arrays), rows):
            arrays = entries.arrays[start : start + rows]
            pool = np.zeros((rows, 1, *arrays[0].shape), np.float32)
            pool[: len(arrays), 0] = arrays
            # Whole where nothing is, so that no key row is all masked.
            lengths = np.full((rows, 1), self._full_length(kind), np.int32)
            lengths[: len(arrays), 0] = entries.lengths[start : start + rows]
            inputs = self.programs.put_batch((pool, lengths))
            done.append(np.asarray(program(self.params[_part(kind)], *inputs))[: len(arrays)])
        return np.concatenate(done).reshape(-1, done[0].shape[-1])

    def _full_length(self, kind: MediaName) -> int:
        return self.model.audio.num_samples if kind == "audio" else 0

    def program(self, kind: MediaName) -> Any:
        """The compiled encoder of one kind of media."""
        shape = (self.programs.rows, 1, *entry_shapes(self.model)[kind])
        specs = self.programs.batch_structs(
            (np.empty(shape, np.float32), np.empty(shape[:2], np.int32))
        )

        def encode(params: Any, pool: jax.Array, length_GJ: jax.Array) -> jax.Array:
            return self._forward(kind, params, pool, length_GJ).astype(self.options.dtype)

        return self.programs.get(f"encode {kind}", encode, (self.params[_part(kind)], *specs))

    def _forward(self, kind: MediaName, params: Any, pool: Any, length_GJ: Any) -> jax.Array:
        width, options, tree = self.model.decoder.hidden_size, self.options, {"params": params}
        if kind in ("image", "video"):
            vision = Vision(self.model.vision, width, options)
            used = jnp.ones(pool.shape[:2], bool)
            is_image = kind == "image"
            pictures = Pictures(pool, None, used) if is_image else Pictures(None, pool, None, used)
            (table,), _ = vision.apply(tree, pictures)
            return table
        if kind == "speech":
            return Speech(self.model.speech, width, options).apply(tree, pool)
        return Audio(self.model.audio, width, options).apply(tree, pool, length_GJ)


def _part(kind: MediaName) -> str:
    return "vision" if kind in ("image", "video") else kind


def _key(file: MediaFile) -> tuple:
    def stamp(path: str) -> tuple:
        found = Path(path)
        if not found.exists():
            raise GenerationError(f"no such file: {path}")
        status = found.stat()
        return str(found.resolve()), status.st_mtime_ns, status.st_size

    stamps = [stamp(path) for path in file.paths]
    if file.modality == "video":  # a folder looks the same when one of its frames is written anew
        with _named(file):
            frames = frame_files(file.paths)
        stamps += [stamp(path) for path in frames]
    return file.modality, tuple(stamps)


class _named:
    """What the system and the readers say about a bad file, as an error that names it."""

    def __init__(self, file: MediaFile):
        self.paths = file.paths

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, BadSample | OSError | ImportError):
            message = str(error)
            if not any(path in message for path in self.paths):
                message = f"{self.paths[0]}: {message}"
            raise GenerationError(message) from error
