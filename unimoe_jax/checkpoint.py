"""Checkpoints: training state with its data position, and what a finished stage leaves behind.

`checkpoints/STAGE/steps/N` holds the state (trained parameters, optimizer, step, seed) and a JSON
with the data position. `checkpoints/STAGE/final` holds a stage's parameters as a flat dictionary
and `manifest.json`: parents, what was trained, where every group of parameters came from. Frozen
parameters are not repeated in every step: a resume takes them from where the stage took them.

Orbax restores a flipped bit without an error, so every finished directory carries checksums that
are checked before it is read. They are against accidents, so XXH3, which is fast, will do. Several
processes write and check their shares side by side, in one folder that all of them see, and where a
stage starts from a result, each reads only what its devices hold (`stage.read_start`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import xxhash

from unimoe_jax.distributed import all_texts, is_writer, lost_peer, wait_for_all
from unimoe_jax.upcycle import Index, Source

SUMS = "XXH3SUMS.json"
MANIFEST = "manifest.json"
CHUNK_BYTES = 8 << 20  # of a stage's result: what a host reads at least, whatever it needs of it


new_sum = xxhash.xxh3_128
"""A running checksum as `seal` keeps them, with the interface of hashlib."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or does not fit."""


# --------------------------------------------------------------------------- integrity


def _names(folder: Path) -> list[str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SUMS]
    return [str(path.relative_to(folder)) for path in files]


def _sums(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Checksums of this process's share of the files."""

    def digest(name: str) -> str:
        if name in known:
            return known[name]
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, new_sum).hexdigest()

    names = _names(folder)[jax.process_index() :: jax.process_count()]
    # Hashing releases the interpreter: large checkpoints are read by several threads at a time.
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def seal(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write the checksums of every file under `folder`; `known` ones were taken while writing.

    All processes call it when the files are there; each sums up its share of them.
    """
    parts = all_texts("seal", json.dumps(_sums(folder, known)))
    if is_writer():
        sums = {name: value for part in parts for name, value in json.loads(part).items()}
        partial = folder / (SUMS + ".partial")
        partial.write_text(json.dumps(dict(sorted(sums.items())), indent=0))
        partial.rename(folder / SUMS)
    wait_for_all("sealed")


def verify(folder: Path) -> None:
    """Compare `folder` with its checksums; all processes call it, each reads its share.

    Raises:
        CheckpointError: no checksums (the write was interrupted), or a file that differs; on all
            processes when any of them finds it.
    """
    found = next(filter(None, all_texts("verify", _damage(folder))), None)
    if found:
        raise CheckpointError(found)


def _damage(folder: Path) -> str:
    """What is wrong with this process's share of the files, or with their number; else empty."""
    try:
        expected = json.loads((folder / SUMS).read_text())
    except FileNotFoundError:
        return f"{folder}: no {SUMS}; the checkpoint is incomplete"
    actual = _sums(folder, {})
    wrong = set(expected) ^ set(_names(folder))
    wrong |= {name for name, value in actual.items() if expected.get(name) != value}
    return f"{folder / min(wrong)}: damaged or missing (its checksum differs)" if wrong else ""


# ----------------------------------------------------------------------- training state


class StepCheckpoints:
    """Asynchronous, numbered checkpoints of one stage; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "position")
        )
        self._sealer = ThreadPoolExecutor(1)
        self._sealing: Future | None = None

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Start writing; returns as soon as the state has been copied off the devices."""
        self.finish()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position))
        )
        self._manager.save(step, args=items, force=True)
        # As soon as it is written: a crash before the next save must not cost this one.
        self._sealing = self._sealer.submit(self._seal, step)

    def _seal(self, step: int) -> None:
        self._manager.wait_until_finished()
        seal(self.folder / str(step))

    def finish(self) -> None:
        """Wait until the write under way is complete and sealed."""
        if self._sealing is not None:
            self._sealing.result()
            self._sealing = None

    def restore_latest(self, template: Any, tell=print) -> tuple[int, Any, dict] | None:
        """(step, state, position) of the newest sound checkpoint, or None when there is none.

        `template` is a state of arrays or shape structs with shardings: the checkpoint may come
        from another mesh. A damaged step is named and passed over.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                verify(self.folder / str(step))
            except CheckpointError as error:
                tell(f"checkpoint of step {step} is not used: {error}")
                continue
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(template), position=ocp.args.JsonRestore()
            )
            restored = self._manager.restore(step, args=items)
            return step, restored["state"], restored["position"]
        return None

    def close(self) -> None:
        """Finish and release the background threads."""
        self.finish()
        self._sealer.shutdown()
        self._manager.close()

    def __enter__(self) -> StepCheckpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        # A write can be finished only together with all processes.
        if error is None or not lost_peer(error):
            self.close()


# ------------------------------------------------------------------------- stage results


def _chunks(leaf: Any) -> ocp.SaveArgs:
    """Stacks of layers and experts are cut into them, so that one can be read without the rest."""
    axes = tuple(range(max(0, leaf.ndim - 2)))
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)


def save_final(folder: Path, params: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Write a finished stage beside its place, seal it, then rename: never half-written."""
    folder = folder.absolute()
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}; not a finished stage") from None


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


def read_part(array: ts.TensorStore, index: Index) -> np.ndarray:
    """`array[index]`; the chunks that it touches are read."""
    return np.asarray((array[index] if index else array).read().result())


def open_source(name: str, folder: Path) -> Source:
    """A finished stage as a source of parameters, of which any part can be read.

    Raises:
        CheckpointError: it is not there or not finished.
    """
    manifest = read_manifest(folder)
    opened = cache(partial(open_array, folder))

    def load(path: str, index: Index) -> np.ndarray:
        return read_part(opened(path), index)

    shapes = {path: tuple(shape) for path, shape in manifest["shapes"].items()}
    return Source(name, shapes, load, tuple(manifest["moe_layers"]), partial(verify, folder))


def load_final(folder: Path) -> dict[str, np.ndarray]:
    """All parameters of a finished stage on the host, {path: array}, after checking the sums."""
    source = open_source(folder.name, folder)
    source.check()
    with ThreadPoolExecutor() as pool:
        values = pool.map(lambda path: source.load(path, ()), source.shapes)
        return dict(zip(source.shapes, values, strict=True))
