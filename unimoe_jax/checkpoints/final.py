"""Checkpoints: training state with its data position, and what a finished stage leaves behind.

`checkpoints/STAGE/steps/N` holds the state (trained parameters, optimizer, step, seed) and a JSON
with the data position. `checkpoints/STAGE/final` holds a stage's parameters as a flat dictionary
and `manifest.json`: parents, what was trained, where every group of parameters came from. Frozen
parameters are not repeated in every step: a resume takes them from where the stage took them.

Every finished directory carries checksums (`integrity`). Where a stage starts from a result, each
process reads only what its devices hold (`stage.read_start`).
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

CHUNK_BYTES = 8 << 20  # of a stage's result: what a host reads at least, whatever it needs of it


# ----------------------------------------------------------------------- training state


# ------------------------------------------------------------------------- stage results


def _chunks(leaf: Any) -> ocp.SaveArgs:
    """Stacks of layers and experts are cut into them, so that one can be read without the rest."""
    axes = tuple(range(max(0, leaf.ndim - 2)))
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)


def save_final(folder: Path, params: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Write a finished stage beside its place, seal it, then rename: never half-written.

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
    """Parameter `path` of a finished stage or an import; what is read of it is read when asked for.

    Raises:
        CheckpointError: it is not there.
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
    """`array[index]`; the chunks that it touches are read."""
    return np.asarray((array[index] if index else array).read().result())


def open_source(name: str, folder: Path) -> ParamSource:
    """A finished stage as a source of parameters, of which any part can be read.

    Raises:
        CheckpointError: it is not there or not finished.
    """
    manifest = read_manifest(folder)
    opened = cache(partial(open_array, folder))

    def load(path: str, index: ArrayIndex) -> np.ndarray:
        return read_part(opened(path), index)

    shapes = {path: tuple(shape) for path, shape in manifest["shapes"].items()}
    return ParamSource(name, shapes, load, tuple(manifest["moe_layers"]), partial(verify, folder))


def load_final(folder: Path) -> dict[str, np.ndarray]:
    """All parameters of a finished stage on the host, {path: array}, after checking the sums."""
    source = open_source(folder.name, folder)
    source.check()
    with ThreadPoolExecutor() as pool:
        values = pool.map(lambda path: source.load(path, ()), source.shapes)
        return dict(zip(source.shapes, values, strict=True))
