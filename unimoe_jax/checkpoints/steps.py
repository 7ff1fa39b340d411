"""The training state of a stage, saved asynchronously every few steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from unimoe_jax.checkpoints.checksums import CheckpointError, seal, verify
from unimoe_jax.checkpoints.layout import unusable_step
from unimoe_jax.parallel.distributed import is_writer, lost_peer, wait_for_all
from unimoe_jax.runtime.files import raising_write_errors

RESUME = "; the same command goes on from the last checkpoint when it can"


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
        with raising_write_errors(self.folder / str(step), RESUME):
            self._manager.save(step, args=items, force=True)
        # As soon as it is written: a crash before the next save must not cost this one.
        self._sealing = self._sealer.submit(self._seal, step)

    def _seal(self, step: int) -> None:
        with raising_write_errors(self.folder / str(step), RESUME):
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

    def restore_latest(
        self, template: Any, announce: Callable[[str], None] = print
    ) -> tuple[int, Any, dict] | None:
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
                announce(f"checkpoint of step {step} is not used: {error}; {self._set_aside(step)}")
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
        target = unusable_step(self.folder, step)
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
