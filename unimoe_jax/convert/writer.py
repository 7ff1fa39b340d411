"""Write parameters into an orbax checkpoint, slice by slice, so that no parameter is ever whole.

Orbax creates the folder, its metadata and an empty zarr array for every parameter. An uncompressed
zarr chunk is a file with the bytes of the chunk, so a few threads then write the slices straight to
their files. A slice is transposed in tiles that fit the cache, its checksum is computed while its
bytes are in memory, and it is never read again. A large slice is stored in several files, so that a
host can read its part of a matrix without the rest.

The result is an ordinary checkpoint of numpy arrays with the layout of
`checkpoints.final.save_final`: `params`, `manifest.json` and checksums. It is written beside its
final place and renamed when it is complete.
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

WORKERS = min(6, (os.cpu_count() or 1) + 1)
"""Number of threads. Every thread holds the pages of one source tensor and one block, so a small
number of threads bounds the memory."""
BLOCK_BYTES = 4 << 20
"""Size of the buffer that a thread fills again and again; to allocate fresh pages for each copy
would take longer than the copy."""
TILE = 64
"""Number of columns that are transposed at a time."""
PIECE_BYTES = 8 << 20
"""Largest size of a file. With this size, one host of eight, which needs an eighth of a large
matrix, reads a fourth of it."""


@dataclass(frozen=True)
class Chunk:
    """One slice of a parameter that is written at once.

    Attributes:
        path: the parameter.
        index: the leading index of the slice, for example (layer, expert).
        read: returns the slice; any strided view and any dtype will do.
        release: called when the bytes of the slice have been written.
    """

    path: str
    index: tuple[int, ...]
    read: Callable[[], np.ndarray]
    release: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter whose value comes in chunks.

    Attributes:
        shape: of the whole parameter.
        dtype: of the file; the chunks are converted to it.
        index_axes: number of leading axes that the index of a chunk covers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    index_axes: int

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
        """Shape of the part of a chunk that one file holds.

        The largest even axis is halved until a piece has at most PIECE_BYTES. Example: bfloat16
        chunks of shape (4096, 14336) have 112 MiB; 14336 is halved twice, then 4096 once, then 3584
        once, which gives pieces of shape (2048, 1792) with 7 MiB, so 16 files per chunk.
        """
        sizes = [max(1, size) for size in self.shape[self.index_axes :]]
        while math.prod(sizes) * self.dtype.itemsize > PIECE_BYTES:
            even = [axis for axis, size in enumerate(sizes) if size % 2 == 0]
            if not even:  # zarr would pad a last, smaller piece to full size
                break
            sizes[max(even, key=sizes.__getitem__)] //= 2
        return tuple(sizes)

    def files(self, index: tuple[int, ...]) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Yield (file name, its part of the chunk) for every file of the chunk at `index`.

        zarr names a file by its position along every axis of the array, joined by dots. Example: a
        chunk of shape (4096, 14336) at index (3,) with pieces of shape (2048, 1792) is stored in
        the files 3.0.0 to 3.1.7, and 3.1.7 holds the rows from 2048 and the columns from 12544.
        """
        sizes = self.shape[self.index_axes :]
        counts = [max(1, size) // length for size, length in zip(sizes, self.piece, strict=True)]
        for position in itertools.product(*map(range, counts)):
            part = tuple(
                slice(i * length, (i + 1) * length)
                for i, length in zip(position, self.piece, strict=True)
            )
            # An array without axes has one file, "0".
            yield ".".join(map(str, (*index, *position))) or "0", part


Work = Chunk | Callable[[], None]


class EmptyArrays(ocp.type_handlers.NumpyHandler):
    """Orbax handler that creates the zarr array of a `Leaf` but writes no chunk of it."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    # This handler is registered for `Leaf` only.
    async def _open_and_write(  # pyright: ignore[reportIncompatibleMethodOverride]  # takes a Leaf
        self, value: Leaf, tspec: dict[str, Any], ts_context: ts.Context
    ) -> None:
        # Orbax may wrap the spec of the array in one that casts to another dtype.
        spec = tspec["base"] if tspec.get("driver") == "cast" else tspec
        chunks = [1] * value.index_axes + list(value.piece)
        # Chunks are not compressed: trained weights hardly compress, and the bytes of an
        # uncompressed chunk can be written without zarr.
        spec["metadata"] |= {"chunks": chunks, "compressor": None}
        await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)


def write_checkpoint(
    folder: Path,
    leaves: Mapping[str, Leaf],
    work: Iterable[Work],
    finish: Callable[[Path], Mapping[str, Any]],
) -> None:
    """Write a whole checkpoint beside `folder`, seal it, and rename it to `folder`.

    Args:
        folder: the new checkpoint.
        leaves: path -> parameter.
        work: every chunk once, in the order in which the sources are read fastest. Other functions
            may come between the chunks; the same threads call them.
        finish: receives the unfinished folder, adds side files and returns the manifest.

    Raises:
        ConvertError: `folder` exists or cannot be written. An error of a chunk passes through.
            After any error, nothing is left on the disk.
    """
    try:
        with raising_write_errors(folder):
            _write(folder.absolute(), leaves, work, finish)
    except WriteError as error:
        raise ConvertError(str(error)) from error


def _write(
    folder: Path,
    leaves: Mapping[str, Leaf],
    work: Iterable[Work],
    finish: Callable[[Path], Mapping[str, Any]],
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists():
        raise ConvertError(f"{folder}: exists already; remove it or choose another --to")
    # An earlier process that was killed may have left a partial folder.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        check_space(partial, sum(leaf.nbytes for leaf in leaves.values()))
        _create_arrays(partial / "params", leaves)
        sums = run(work, partial / "params", leaves)
        # The manifest may depend on digests that `work` has computed, so it is written last.
        manifest = finish(partial)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        seal(partial, {f"params/{name}": digest for name, digest in sums.items()})
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _create_arrays(params: Path, leaves: Mapping[str, Leaf]) -> None:
    """Let orbax create its metadata and an empty array for every parameter."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (Leaf, EmptyArrays())
    )
    # Without OCDBT every chunk is a separate file, which `run` can write.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False)
    with quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(params, dict(leaves), force=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide orbax's warning that it has nothing to merge, which is true and needs no action."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_space(folder: Path, nbytes: int) -> None:
    """Check that the disk of `folder` has `nbytes` bytes left. Raises ConvertError if not."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ConvertError(
            f"{folder.parent}: the checkpoint needs {nbytes:,} bytes, but the disk has {free:,} "
            "left; free some space or choose another --to"
        )


def run(work: Iterable[Work], params: Path, leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """Do all work in a few threads.

    Returns:
        Path of every written file below `params` -> checksum.

    Raises:
        The exception of the first piece of work that fails. Work that has not started is dropped.
    """

    def do(item: Work) -> dict[str, str]:
        if not isinstance(item, Chunk):
            item()
            return {}
        leaf, value = leaves[item.path], item.read()
        sums = {}
        for file, part in leaf.files(item.index):
            name = f"{item.path}/{file}"
            sums[name] = write_chunk(params / name, value[part], leaf.dtype)
        item.release()
        return sums

    with ThreadPoolExecutor(WORKERS) as pool:
        futures: list[Future] = [pool.submit(do, item) for item in work]
        try:
            return {name: digest for future in futures for name, digest in future.result().items()}
        finally:  # after an error or Ctrl-C, do not start the remaining work
            pool.shutdown(wait=True, cancel_futures=True)


def write_chunk(path: Path, value: np.ndarray, dtype: np.dtype) -> str:
    """Write the elements of `value` in C order as `dtype`, and return the checksum of the file."""
    digest = new_sum()
    with path.open("wb") as file:
        for block in blocks(value, dtype):
            digest.update(block)
            file.write(block)
        file.flush()
        # Let the disk start writing now; otherwise the kernel waits until memory is full of
        # unwritten pages.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def blocks(value: np.ndarray, dtype: np.dtype) -> Iterator[memoryview]:
    """Yield the bytes of `value` in C order as `dtype`, block by block.

    A block is valid until the next block is requested, because all blocks share one buffer.
    Example: a transposed float32 matrix of shape (8192, 4096) comes in 32 blocks of 256 rows, each
    4 MiB long.
    """
    if value.ndim < 2:
        value = value.reshape(1, -1)
    if not value.size:
        return
    rows = max(1, BLOCK_BYTES // (value[0].size * dtype.itemsize))
    is_ready = value.flags.c_contiguous and value.dtype == dtype
    if value.dtype == dtype:
        # numpy copies integers faster than bfloat16 and the other small float types.
        as_integers = np.dtype(f"u{dtype.itemsize}")
        value, dtype = value.view(as_integers), as_integers
    if is_ready:
        for start in range(0, len(value), rows):
            yield _bytes_of(value[start : start + rows])
        return
    buffer = np.empty((min(rows, len(value)), *value.shape[1:]), dtype)
    for start in range(0, len(value), rows):
        block = value[start : start + rows]
        copy_tiled(block, buffer[: len(block)])
        yield _bytes_of(buffer[: len(block)])


def _bytes_of(block: np.ndarray) -> memoryview:
    return block.reshape(-1).view(np.uint8).data


def copy_tiled(source: np.ndarray, target: np.ndarray) -> None:
    """Copy `source` to `target` of the same shape, converting the dtype.

    A matrix is copied in tiles of TILE columns, so that the cache lines of a transposed source are
    still in the cache when the next row of the tile needs them.
    """
    if source.ndim != 2:
        target[:] = source
        return
    for column in range(0, source.shape[1], TILE):
        target[:, column : column + TILE] = source[:, column : column + TILE]
