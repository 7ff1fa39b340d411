"""What a finished stage leaves behind: `checkpoints/STAGE/final`.

The folder holds the stage's parameters as a flat dictionary of arrays, `manifest.json` (parents,
which parameters were trained, where every group of parameters came from) and checksums. A stage
that starts from it reads on each process only the parts that its devices hold
(`stages.initial_params`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from unimoe_jax.checkpoints.checksums import CheckpointError, seal, verify
from unimoe_jax.checkpoints.manifest import MANIFEST, read_manifest
from unimoe_jax.checkpoints.sources import ArrayIndex, ParamSource
from unimoe_jax.checkpoints.steps import RESUME
from unimoe_jax.parallel.distributed import is_writer, wait_for_all
from unimoe_jax.runtime.files import raising_write_errors

CHUNK_BYTES = 8 << 20
"""Size of a saved chunk. A host that needs any part of a chunk has to read all of it."""


def _chunks(leaf: Any) -> ocp.SaveArgs:
    """How a parameter is cut into chunks.

    All axes but the last two stack layers and experts. They are cut into chunks of one entry, so
    that one layer or one expert can be read without the others.
    """
    axes = tuple(range(max(0, leaf.ndim - 2)))
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)


def save_final(folder: Path, params: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Write a finished stage into a folder beside `folder`, seal it, then rename it.

    So `folder` is complete whenever it exists.

    Raises:
        WriteError: no space, or no permission.
    """
    with raising_write_errors(folder, RESUME):
        _save_final(folder.absolute(), params, manifest)


def _save_final(folder: Path, params: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    if is_writer():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all("place for a result")
    with ocp.StandardCheckpointer() as checkpointer:
        chunks = {path: _chunks(leaf) for path, leaf in params.items()}
        checkpointer.save(partial / "params", dict(params), save_args=chunks, force=True)
    if is_writer():
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    wait_for_all("result")
    seal(partial)
    if is_writer():
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    wait_for_all("result in place")


def open_array(folder: Path, path: str) -> ts.TensorStore:
    """Open the parameter `path` of a finished stage or an import; nothing of it is read yet.

    Raises:
        CheckpointError: there is no such parameter.
    """
    base = folder.absolute() / "params"
    store: dict[str, Any] = {"driver": "file", "path": f"{base / path}/"}
    if (base / "manifest.ocdbt").is_file():
        store = {"driver": "ocdbt", "base": f"file://{base}/", "path": f"{path}/"}
    try:
        return ts.open({"driver": "zarr", "kvstore": store}, read=True, open=True).result()
    except ValueError as error:
        raise CheckpointError(f"{folder}: {path!r} cannot be read: {error}") from error


def read_part(array: ts.TensorStore, index: ArrayIndex) -> np.ndarray:
    """Read `array[index]` from the chunks that it touches."""
    return np.asarray((array[index] if index else array).read().result())


def open_source(name: str, folder: Path) -> ParamSource:
    """Open a finished stage as a source, from which any part of a parameter can be read.

    Raises:
        CheckpointError: it does not exist or is not finished.
    """
    manifest = read_manifest(folder)
    opened = cache(partial(open_array, folder))

    def load(path: str, index: ArrayIndex) -> np.ndarray:
        return read_part(opened(path), index)

    shapes = {path: tuple(shape) for path, shape in manifest["shapes"].items()}
    return ParamSource(name, shapes, load, tuple(manifest["moe_layers"]), partial(verify, folder))


def load_final(folder: Path) -> dict[str, np.ndarray]:
    """All parameters of a finished stage by path, read to the host after a check of the files."""
    source = open_source(folder.name, folder)
    source.check()
    with ThreadPoolExecutor() as pool:
        values = pool.map(lambda path: source.load(path, ()), source.shapes)
        return dict(zip(source.shapes, values, strict=True))
