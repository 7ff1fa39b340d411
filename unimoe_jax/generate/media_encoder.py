"""Media files -> soft tokens. Files that were encoded lately are remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
"""Files whose soft tokens are kept, the latest ones."""


class MediaEncoder:
    """Runs the encoders and connectors of a model, one pool entry per device at a time.

    params: {vision|speech|audio: parameters}, on the devices.
    """

    def __init__(
        self,
        model: ModelConfig,
        options: LayerOptions,
        params: dict[str, Any],
        program_cache: ProgramCache,
    ):
        self.model, self.options, self.params = model, options, params
        self.processors = Processors(model)
        self.program_cache = program_cache
        self._remembered: OrderedDict[Any, np.ndarray] = OrderedDict()

    # ------------------------------------------------------------------------------- files

    def count(self, file: MediaFile) -> int:
        """The number of soft tokens of a file, from its header.

        Raises:
            GenerationError: the file is missing, hostile or unreadable, or longer than the model
                can take.
        """
        with _errors_name(file):
            _key(file)
            entries, found = self.processors.count(file)
        self._check_length(file, entries, found)
        return entries * self.model.tokens_per_medium()[file.modality]

    def _check_length(self, file: MediaFile, entries: int, found: int) -> None:
        """Refuse a file with more chunks than the model takes; nothing is ever cut off."""
        if found > entries:
            seconds = self._branch(file.modality).chunk_seconds
            raise GenerationError(
                f"{file.paths[0]}: {found} chunks of {seconds} s; this model takes {entries}; "
                f"shorten the file or raise max_chunks of the model's {file.modality} settings"
            )

    def encode(self, files: Sequence[MediaFile]) -> list[np.ndarray]:
        """Soft tokens [n,D] of each file.

        Raises:
            GenerationError: as `count`, or decoding has found another fault.
        """
        soft = []
        for file in files:
            with _errors_name(file):
                key = _key(file)
            # Keep a reference in `soft`: another thread may drop the entry at any moment.
            known = self._remembered.pop(key, None)
            soft.append(self._encode(file) if known is None else known)
            self._remembered[key] = soft[-1]
        # Drop the files that were used longest ago.
        while len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)
        return soft

    def warm_up(self, files: Iterable[MediaFile]) -> None:
        """Compile the programs that encode these files."""
        kinds: set[MediaName] = {"image" if self._frames(f) else f.modality for f in files}
        for kind in sorted(kinds):
            self.program(kind)

    def _frames(self, file: MediaFile) -> list[MediaFile]:
        """The frames of a video that have to be encoded as images, one by one.

        A video may be given as a folder or list of frames. The video program takes a fixed number
        of frames, and any other number would need another program.
        """
        if file.modality != "video":
            return []
        with _errors_name(file):
            paths = frame_files(file.paths)
        if len(paths) == self._branch("video").frames:
            return []
        return [MediaFile("image", (path,)) for path in paths]

    def _encode(self, file: MediaFile) -> np.ndarray:
        """Soft tokens [n,D] of one file."""
        frames = self._frames(file)
        if not frames:
            return self._encode_whole(file)
        # Average all frames that the user has chosen, as the originals do.
        total, dtype = np.float32(0), np.dtype(self.options.dtype)
        for frame in frames:
            total = total + self._encode_whole(frame).astype(np.float32)
        return (total / np.float32(len(frames))).astype(dtype)

    def _encode_whole(self, file: MediaFile) -> np.ndarray:
        """Soft tokens [n,D] of a file that one program encodes."""
        with _errors_name(file):
            entries = self.processors.load(file)
        # Check again: a header may announce less than the file holds.
        self._check_length(file, len(entries.arrays), entries.found)
        return self._soft_tokens(file.modality, entries)

    # ---------------------------------------------------------------------------- programs

    def _soft_tokens(self, kind: MediaName, entries: Entries) -> np.ndarray:
        """Soft tokens [n,D] of the pool entries of one file, one after the other."""
        rows = self.program_cache.data_shards
        program, results = self.program(kind), []
        for start in range(0, len(entries.arrays), rows):
            arrays = entries.arrays[start : start + rows]
            pool = np.zeros((rows, 1, *arrays[0].shape), np.float32)
            pool[: len(arrays), 0] = arrays
            # Give empty entries the full length: a row whose keys are all masked would be NaN.
            full_length = self._branch("audio").num_samples if kind == "audio" else 0
            lengths = np.full((rows, 1), full_length, np.int32)
            lengths[: len(arrays), 0] = entries.lengths[start : start + rows]
            inputs = self.program_cache.put_batch((pool, lengths))
            soft = np.asarray(program(self.params[_branch_name(kind)], *inputs))
            results.append(soft[: len(arrays)])
        return np.concatenate(results).reshape(-1, results[0].shape[-1])

    def program(self, kind: MediaName) -> Any:
        """The compiled encoder of one kind of media.

        (parameters, pool [G,1,…], length_GJ) -> soft tokens, for one entry on each of G data
        shards. Only audio reads the lengths, in samples.
        """
        shape = (self.program_cache.data_shards, 1, *entry_shapes(self.model)[kind])
        specs = self.program_cache.batch_structs(
            (np.empty(shape, np.float32), np.empty(shape[:2], np.int32))
        )

        def encode(params: Any, pool: jax.Array, length_GJ: jax.Array) -> jax.Array:
            return self._forward(kind, params, pool, length_GJ).astype(self.options.dtype)

        inputs = (self.params[_branch_name(kind)], *specs)
        return self.program_cache.get(f"encode {kind}", encode, inputs)

    def _forward(self, kind: MediaName, params: Any, pool: Any, length_GJ: Any) -> Any:
        """Encoder and connector of one kind of media, traced by `program`."""
        width, options, tree = self.model.decoder.hidden_size, self.options, {"params": params}
        settings = self._branch(kind)
        if kind in ("image", "video"):
            used = jnp.ones(pool.shape[:2], bool)
            if kind == "image":
                pictures = Pictures(pool, None, used)
            else:
                pictures = Pictures(None, pool, None, used)
            (table,), _ = Vision(settings, width, options).apply(tree, pictures)
            return table
        if kind == "speech":
            return Speech(settings, width, options).apply(tree, pool)
        return Audio(settings, width, options).apply(tree, pool, length_GJ)

    def _branch(self, kind: MediaName) -> Any:
        """Settings of the encoder and connector of one kind of media."""
        return getattr(self.model, _branch_name(kind))


def _branch_name(kind: MediaName) -> str:
    """Images and videos share the vision encoder; every other kind has the encoder of its name."""
    return "vision" if kind in ("image", "video") else kind


def _key(file: MediaFile) -> tuple:
    """Identifies the content of a file without reading it: path, time of change and size.

    Raises:
        GenerationError: the file does not exist.
    """

    def stamp(name: str) -> tuple:
        path = Path(name)
        if not path.exists():
            raise GenerationError(f"no such file: {name}")
        status = path.stat()
        return str(path.resolve()), status.st_mtime_ns, status.st_size

    stamps = [stamp(path) for path in file.paths]
    if file.modality == "video":
        # Look at every frame: a folder does not change if one of its files is overwritten.
        with _errors_name(file):
            frames = frame_files(file.paths)
        stamps += [stamp(path) for path in frames]
    return file.modality, tuple(stamps)


@contextmanager
def _errors_name(file: MediaFile) -> Iterator[None]:
    """Turn errors of the system and of the readers into a GenerationError that names the file."""
    try:
        yield
    except (BadSample, OSError, ImportError) as error:
        message = str(error)
        if not any(path in message for path in file.paths):
            message = f"{file.paths[0]}: {message}"
        raise GenerationError(message) from error
