"""Checkpoints: training state with its data position, and what a finished stage leaves behind.

`checkpoints/STAGE/steps/N` holds the state (trained parameters, optimizer, step, seed) and a JSON
with the data position. `checkpoints/STAGE/final` holds a stage's parameters as a flat dictionary
and `manifest.json`: parents, what was trained, where every group of parameters came from. Frozen
parameters are not repeated in every step: a resume takes them from where the stage took them.

Orbax restores a flipped bit without an error, so every finished directory carries SHA-256 sums that
are checked before it is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from unimoe_jax.upcycle import Source

SUMS = "SHA256SUMS.json"
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or does not fit."""


# --------------------------------------------------------------------------- integrity


def _sums(folder: Path) -> dict[str, str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SUMS]
    # Hashing releases the interpreter: large checkpoints are read by several threads at a time.
    with ThreadPoolExecutor() as pool:
        sums = pool.map(digest, files)
        return {str(p.relative_to(folder)): s for p, s in zip(files, sums, strict=True)}


def seal(folder: Path) -> None:
    """Write the checksums of every file under `folder`."""
    text = json.dumps(_sums(folder), indent=0)
    partial = folder / (SUMS + ".partial")
    partial.write_text(text)
    partial.rename(folder / SUMS)


def verify(folder: Path) -> None:
    """Compare `folder` with its checksums.

    Raises:
        CheckpointError: no checksums (the write was interrupted), or a file that differs.
    """
    try:
        expected = json.loads((folder / SUMS).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {SUMS}; the checkpoint is incomplete") from None
    actual = _sums(folder)
    for name in sorted(set(expected) | set(actual)):
        if expected.get(name) != actual.get(name):
            raise CheckpointError(f"{folder / name}: damaged or missing (its checksum differs)")


# ----------------------------------------------------------------------- training state


class StepCheckpoints:
    """Asynchronous, numbered checkpoints of one stage; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "position")
        )
        self._unsealed: list[int] = []

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Start writing; returns as soon as the state has been copied off the devices."""
        self.finish()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position))
        )
        self._manager.save(step, args=items, force=True)
        self._unsealed.append(step)

    def finish(self) -> None:
        """Wait for the write under way and seal it."""
        self._manager.wait_until_finished()
        for step in self._unsealed:
            folder = self.folder / str(step)
            if jax.process_index() == 0 and folder.is_dir():
                seal(folder)
        self._unsealed.clear()

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
        self._manager.close()


# ------------------------------------------------------------------------- stage results


def save_final(folder: Path, params: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Write a finished stage beside its place, seal it, then rename: never half-written."""
    folder = folder.absolute()
    partial = folder.with_name(folder.name + ".partial")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "params", dict(params), force=True)
    if jax.process_index() == 0:
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        seal(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}; not a finished stage") from None


def load_final(folder: Path) -> dict[str, np.ndarray]:
    """All parameters of a finished stage on the host, {path: array}, after checking the sums."""
    folder = folder.absolute()
    verify(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        meta = checkpointer.metadata(folder / "params").item_metadata.tree
        template = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in meta.items()}
        return checkpointer.restore(folder / "params", template)


def open_source(name: str, folder: Path) -> Source:
    """A finished stage as a source of parameters; read when first needed."""
    manifest = read_manifest(folder)
    cache: dict[str, np.ndarray] = {}

    def load(path: str) -> np.ndarray:
        if not cache:
            cache.update(load_final(folder))
        return cache[path]

    shapes = {path: tuple(shape) for path, shape in manifest["shapes"].items()}
    return Source(name, shapes, load, tuple(manifest["moe_layers"]))
