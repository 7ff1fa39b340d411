"""Parameters into an orbax checkpoint, slice by slice, without holding any of them.

Orbax makes the folder, its metadata and an empty zarr array for every parameter. An uncompressed
zarr chunk is a file with the chunk's bytes, so the slices are then written straight into place by a
few threads: transposed in tiles that fit a cache, summed for the seal while they are there, and
never read again. Large slices lie in several files, so that a host can read its part of a matrix.
What results is an ordinary checkpoint of numpy arrays, with the layout of `checkpoint.save_final`:
`params`, `manifest.json`, checksums, renamed into place when complete.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from unimoe_jax.checkpoints.checksums import new_sum, seal
from unimoe_jax.checkpoints.manifest import MANIFEST
from unimoe_jax.convert.reader import ConvertError
from unimoe_jax.runtime.files import WriteError, raising_write_errors

# Every thread holds one source tensor's pages and one block, so few threads bound the memory.
WORKERS = min(6, (os.cpu_count() or 1) + 1)
BLOCK_BYTES = 4 << 20  # one large buffer that is used again: fresh pages cost more than the copy
TILE = 64  # columns transposed at a time
PIECE_BYTES = 8 << 20  # of a file: a host of eight reads a fourth of a large matrix for an eighth


@dataclass(frozen=True)
class Chunk:
    """The slice of parameter `path` at a leading index, as it will lie on disk.

    `read` may return any strided view, of another dtype too; `release` is called when its bytes
    have been written.
    """

    path: str
    index: tuple[int, ...]
    read: Callable[[], np.ndarray]
    release: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter whose value comes in chunks; `lead` axes are indexed by them."""

    shape: tuple[int, ...]
    dtype: np.dtype
    lead: int

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def piece(self) -> tuple[int, ...]:
        """Shape of the files of a chunk: its largest even axis is halved until they are small."""
        sizes = [max(1, size) for size in self.shape[self.lead :]]
        while math.prod(sizes) * self.dtype.itemsize > PIECE_BYTES:
            even = [axis for axis, size in enumerate(sizes) if size % 2 == 0]
            if not even:  # zarr would fill up a last, smaller piece
                break
            sizes[max(even, key=sizes.__getitem__)] //= 2
        return tuple(sizes)

    def files(self, index: tuple[int, ...]) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """(name, part of the chunk at `index`) of its files in a zarr array: a name is the place
        along every axis, joined by dots."""
        sizes = self.shape[self.lead :]
        counts = [max(1, size) // part for size, part in zip(sizes, self.piece, strict=True)]
        for at in itertools.product(*map(range, counts)):
            part = (slice(i * n, (i + 1) * n) for i, n in zip(at, self.piece, strict=True))
            yield ".".join(map(str, (*index, *at))) or "0", tuple(part)


Work = Chunk | Callable[[], None]


class EmptyArrays(ocp.type_handlers.NumpyHandler):
    """Creates the arrays of `Leaf`s, and leaves the chunks to `write_checkpoint`."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(
        self, value: Leaf, tspec: dict[str, Any], ts_context: ts.Context
    ) -> None:
        spec = tspec["base"] if tspec.get("driver") == "cast" else tspec
        chunks = [1] * value.lead + list(value.piece)
        # Uncompressed: trained weights hardly compress.
        spec["metadata"] |= {"chunks": chunks, "compressor": None}
        await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)


def write_checkpoint(
    folder: Path,
    leaves: Mapping[str, Leaf],
    work: Iterable[Work],
    finish: Callable[[Path], Mapping[str, Any]],
) -> None:
    """Write `leaves` beside `folder`, let `finish` add files, seal, then rename.

    Args:
        work: every chunk once, in the order in which the sources are best read; other functions
            may stand between them and share the threads.
        finish: gets the unfinished folder, adds side files and returns the manifest.

    Raises:
        ConvertError: `folder` exists, or cannot be written; or whatever a chunk raises. Nothing is
            left behind then.
    """
    try:
        with raising_write_errors(folder):
            _write(folder.absolute(), leaves, work, finish)
    except WriteError as error:
        raise ConvertError(str(error)) from error


def _write(folder: Path, leaves, work, finish) -> None:
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists():
        raise ConvertError(f"{folder}: exists already; remove it or choose another --to")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        check_space(partial, sum(leaf.nbytes for leaf in leaves.values()))
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, ocp.type_handlers.ArrayHandler()), (Leaf, EmptyArrays())
        )
        inner = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False)
        with quiet(), ocp.Checkpointer(inner) as checkpointer:
            checkpointer.save(partial / "params", dict(leaves), force=True)
        sums = run(work, partial / "params", leaves)
        manifest = finish(partial)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        seal(partial, {f"params/{name}": digest for name, digest in sums.items()})
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Orbax warns that it has nothing to merge; there is nothing, and nobody can act on that."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_space(folder: Path, nbytes: int) -> None:
    """Raises ConvertError where `folder`'s disk has not room for `nbytes`."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ConvertError(
            f"{folder.parent}: needs {nbytes:,} bytes, the disk has {free:,} left; free some space "
            "or choose another --to"
        )


def run(work: Iterable[Work], params: Path, leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """Do all work in a few threads; {file of a chunk below `params`: checksum}.

    Raises:
        whatever the first failing piece of work raises; the rest is not begun then.
    """

    def do(item: Work) -> dict[str, str]:
        if not isinstance(item, Chunk):
            item()
            return {}
        leaf, value, sums = leaves[item.path], item.read(), {}
        for file, part in leaf.files(item.index):
            name = f"{item.path}/{file}"
            sums[name] = write_chunk(params / name, value[part], leaf.dtype)
        item.release()
        return sums

    with ThreadPoolExecutor(WORKERS) as pool:
        futures: list[Future] = [pool.submit(do, item) for item in work]
        try:
            return {name: digest for future in futures for name, digest in future.result().items()}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def write_chunk(path: Path, value: np.ndarray, dtype: np.dtype) -> str:
    """Write the elements of `value` in C order as `dtype`; returns the file's checksum."""
    digest = new_sum()
    with path.open("wb") as file:
        for block in blocks(value, dtype):
            digest.update(block)
            file.write(block)
        file.flush()
        if hasattr(os, "posix_fadvise"):  # the disk begins now, not when memory is full of it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def blocks(value: np.ndarray, dtype: np.dtype) -> Iterator[memoryview]:
    """The bytes of `value` in C order as `dtype`, piece by piece.

    A piece is valid until the next one is asked for.
    """
    if value.ndim < 2:
        value = value.reshape(1, -1)
    if not value.size:
        return
    rows = max(1, BLOCK_BYTES // (value[0].size * dtype.itemsize))
    is_ready = value.flags.c_contiguous and value.dtype == dtype
    if value.dtype == dtype:  # plain integers move faster than the small float types
        as_integers = np.dtype(f"u{dtype.itemsize}")
        value, dtype = value.view(as_integers), as_integers
    buffer = None if is_ready else np.empty((min(rows, len(value)), *value.shape[1:]), dtype)
    for start in range(0, len(value), rows):
        block = value[start : start + rows]
        if not is_ready:
            copy_tiled(block, buffer[: len(block)])
            block = buffer[: len(block)]
        yield memoryview(block.reshape(-1).view(np.uint8))


def copy_tiled(source: np.ndarray, target: np.ndarray) -> None:
    """target[:] = source; a transposed matrix goes in tiles, so that lines stay in the cache."""
    if source.ndim != 2:
        target[:] = source
        return
    for column in range(0, source.shape[1], TILE):
        target[:, column : column + TILE] = source[:, column : column + TILE]
