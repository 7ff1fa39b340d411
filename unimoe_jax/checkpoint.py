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
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from unimoe_jax.config_yaml import ConfigError, parse
from unimoe_jax.disk import writing
from unimoe_jax.distributed import is_writer, lost_peer, wait_for_all
from unimoe_jax.integrity import ORIGINAL, CheckpointError, check_files, seal, verify
from unimoe_jax.upcycle import Index, Source

MANIFEST = "manifest.json"
RESUME = "; the same command goes on from the last checkpoint when it can"
CHUNK_BYTES = 8 << 20  # of a stage's result: what a host reads at least, whatever it needs of it


# ----------------------------------------------------------------------- training state


class StepCheckpoints:
    """Asynchronous, numbered checkpoints of one stage; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder.absolute(), keep
        # What a crash has left half-written goes. Orbax would also remove older steps before a new
        # one is sealed: a crash between the two would leave none that can be used.
        options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "position")
        )
        self._sealer = ThreadPoolExecutor(1)
        self._sealing: Future | None = None

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Start writing; returns as soon as the state has been copied off the devices.

        Raises:
            WriteError: this step or the one before cannot be written.
        """
        self.finish()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position))
        )
        with writing(self.folder / str(step), RESUME):
            self._manager.save(step, args=items, force=True)
        # As soon as it is written: a crash before the next save must not cost this one.
        self._sealing = self._sealer.submit(self._seal, step)

    def _seal(self, step: int) -> None:
        with writing(self.folder / str(step), RESUME):
            self._manager.wait_until_finished()
            seal(self.folder / str(step))
        if is_writer():
            steps = sorted(int(path.name) for path in self.folder.iterdir() if _is_step(path))
            for old in steps[: -self.keep]:
                # What cannot be removed now is tried again after the next step.
                shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def finish(self) -> None:
        """Wait until the write under way is complete and sealed. Raises WriteError."""
        if self._sealing is not None:
            self._sealing.result()
            self._sealing = None

    def restore_latest(self, template: Any, tell=print) -> tuple[int, Any, dict] | None:
        """(step, state, position) of the newest sound checkpoint, or None when there is none.

        `template` is a state of arrays or shape structs with shardings: the checkpoint may come
        from another mesh. A damaged step is named and moved to `unusable`, beside the steps: its
        place must be free when training comes to it again.

        Raises:
            CheckpointError: the newest sound step holds a state of another structure.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                verify(self.folder / str(step))
            except CheckpointError as error:
                tell(f"checkpoint of step {step} is not used: {error}; {self._set_aside(step)}")
                continue
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(template), position=ocp.args.JsonRestore()
            )
            try:
                restored = self._manager.restore(step, args=items)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{self.folder / str(step)}: its state does not fit what trains now, or the "
                    "optimizer; take back the settings that changed since, or remove "
                    f"{self.folder} to start the stage again"
                ) from error
            return step, restored["state"], restored["position"]
        return None

    def _set_aside(self, step: int) -> str:
        """Process 0 moves the step, the others wait for it. Returns what was done, for a message.

        Raises:
            CheckpointError: it cannot be moved.
        """
        source = self.folder / str(step)
        target = self.folder.with_name("unusable") / str(step)
        if is_writer():
            try:
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                source.rename(target)
            except OSError as error:
                raise CheckpointError(
                    f"{source}: unusable, and cannot be moved to {target} ({error.strerror}); "
                    "remove it"
                ) from error
        wait_for_all("unusable step")
        self._manager.reload()  # it remembers which steps there are
        return f"moved to {target}"

    @staticmethod
    def newest(folder: Path) -> tuple[int, dict[str, tuple[int, ...]]] | None:
        """(step, {path: shape} of what trained) of the newest step that says so, or None.

        Reads descriptions alone and changes nothing: for checks before a run is touched.
        """
        steps = [int(path.name) for path in folder.glob("*") if _is_step(path)]
        for step in sorted(steps, reverse=True):
            try:
                state = folder.absolute() / str(step) / "state"
                trained = ocp.PyTreeCheckpointHandler().metadata(state).tree["trained"]
                return step, {path: tuple(leaf.shape) for path, leaf in trained.items()}
            except (OSError, AttributeError, KeyError, TypeError, ValueError):
                continue  # damaged: `restore_latest` will say so
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


def _is_step(path: Path) -> bool:
    return path.name.isdecimal()


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
    with writing(folder, RESUME):
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage or an import.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}; not a finished stage")
    check_files(folder, MANIFEST)
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}; {ORIGINAL}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no object of settings; {ORIGINAL}")
    return content


def run_file_of(final: Path) -> Path | None:
    """config.yaml of the run that RUN/checkpoints/STAGE/final belongs to, None where there is none.

    A link may lead into a run, or out of it where checkpoints are kept elsewhere: what counts is
    where the folder is named, then where it lies.
    """
    for place in (Path(os.path.abspath(final)), final.resolve()):
        file = place.parent.parent.parent / "config.yaml"
        if file.is_file():
            return file
    return None


def read_settings(file: Path) -> dict[str, Any]:
    """Model settings in a YAML file: what stands under `model`, else all of it.

    Raises:
        CheckpointError: there is no such file, or it holds no settings.
    """
    try:
        content = parse(file.read_text(), str(file))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; give a model.yaml") from None
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        named = "" if str(file) in str(error) else f"{file}: "
        raise CheckpointError(f"{named}{error}") from error
    if isinstance(content, dict):
        content = content.get("model", content)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file}: holds no model settings; give a mapping under `model:`")
    return content


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
