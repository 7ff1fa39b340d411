"""Parameters into an orbax checkpoint, slice by slice, without holding any of them.

Orbax writes whole arrays; a handler for `Streamed` leaves writes each slice into its own chunk of
the array instead. What results is an ordinary checkpoint of numpy arrays, with the layout of
`checkpoint.save_final`: `params`, `manifest.json`, checksums, renamed into place when complete.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from unimoe_jax.checkpoint import MANIFEST, seal
from unimoe_jax.convert.reader import ConvertError

IN_FLIGHT = 3  # slices read or written at a time


class Slice(NamedTuple):
    """A part of a parameter at a leading index; `release` is called when it has been written."""

    index: tuple[int, ...]
    read: Callable[[], np.ndarray]
    release: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Streamed:
    """A leaf whose value comes in slices, all of the same rank: `lead` axes are indexed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    lead: int
    slices: Callable[[], Iterable[Slice]]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Streamed` leaves as numpy arrays, one leaf after the other.

    Chunks are the slices, uncompressed: trained weights hardly compress, and a chunk that is
    written once is never read back to be completed.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._turn: asyncio.Semaphore | None = None
        self.error: BaseException | None = None
        self._pool = ThreadPoolExecutor(IN_FLIGHT)

    async def _open_and_write(
        self, value: Streamed, tspec: dict[str, Any], ts_context: ts.Context
    ) -> None:
        if self._turn is None:
            self._turn = asyncio.Semaphore(1)
        async with self._turn:
            spec = tspec["base"] if tspec.get("driver") == "cast" else tspec
            chunk = (1,) * value.lead + value.shape[value.lead :]
            spec["metadata"] |= {"chunks": list(chunk), "compressor": None}
            # Only the sealed and renamed folder counts: single writes need not reach the disk.
            context = ts.Context(ts_context.spec.to_json() | {"file_io_sync": False})
            array = await ts.open(ts.Spec(tspec), create=True, open=True, context=context)
            room = asyncio.Semaphore(IN_FLIGHT)
            loop = asyncio.get_running_loop()

            async def move(part: Slice) -> None:
                try:
                    data = await loop.run_in_executor(self._pool, lambda: contiguous(part.read()))
                    await array[part.index].write(data, can_reference_source_data_indefinitely=True)
                    part.release()
                finally:
                    room.release()

            moves = []
            for part in value.slices() if self.error is None else ():
                await room.acquire()
                if any(done.done() and done.exception() for done in moves):
                    break
                moves.append(asyncio.ensure_future(move(part)))
            errors = [e for e in await asyncio.gather(*moves, return_exceptions=True) if e]
            # Kept, not raised: orbax would close the event loop under the leaves that wait.
            self.error = self.error or next(iter(errors), None)


def contiguous(value: np.ndarray) -> np.ndarray:
    """`value` in C order.

    jax's transfer of a strided host array transposes in cache-sized, vectorised tiles: four times
    as fast as numpy. It has no 8-byte types by default, so those take numpy's way.
    """
    if value.flags.c_contiguous:
        return value
    if value.dtype.itemsize > 4:
        return np.ascontiguousarray(value)
    return np.asarray(jax.device_put(value, jax.local_devices(backend="cpu")[0]))


def write_checkpoint(
    folder: Path,
    leaves: Mapping[str, Streamed],
    finish: Callable[[Path], Mapping[str, Any]],
) -> None:
    """Write `leaves` beside `folder`, let `finish` add files, seal, then rename.

    Args:
        finish: gets the unfinished folder, adds side files and returns the manifest.

    Raises:
        ConvertError: `folder` exists; or whatever a slice raises. Nothing is left behind then.
    """
    folder = folder.absolute()
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists():
        raise ConvertError(f"{folder}: exists already; remove it or choose another --to")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        handler = StreamedHandler()
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, ocp.type_handlers.ArrayHandler()), (Streamed, handler)
        )
        inner = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=True)
        try:
            with ocp.Checkpointer(inner) as checkpointer:
                checkpointer.save(partial / "params", dict(leaves), force=True)
        except ValueError:
            # Orbax misses the leaves that were skipped after the first error.
            if handler.error is None:
                raise
        if handler.error is not None:
            raise handler.error
        manifest = finish(partial)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        seal(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
