"""The training state of a stage, saved asynchronously every few steps.

`checkpoints/STAGE/steps/N` holds the state after N steps (trained parameters, optimizer, step,
seed) and a JSON with the position in the data. Frozen parameters are not saved with every step: a
resumed run takes them from where the stage took them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

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
        # Remove what a crash has left half-written. Orbax could remove old steps as well, but it
        # would do so before a new step is sealed, and a crash between the two would leave no step
        # that can be used. So _seal() removes old steps.
        options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "position")
        )
        self._sealer = ThreadPoolExecutor(1)
        self._sealing: Future | None = None

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Start writing; return as soon as the state has been copied off the devices.

        Raises:
            WriteError: this step or the previous one cannot be written.
        """
        self.finish()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position))
        )
        with raising_write_errors(self.folder / str(step), RESUME):
            self._manager.save(step, args=items, force=True)
        # Seal the step as soon as it is written, so that a crash before the next save does not
        # make it useless.
        self._sealing = self._sealer.submit(self._seal, step)

    def _seal(self, step: int) -> None:
        """Wait for the step to be written, write its checksums, and remove old steps."""
        with raising_write_errors(self.folder / str(step), RESUME):
            self._manager.wait_until_finished()
            seal(self.folder / str(step))
        if is_writer():
            steps = sorted(int(path.name) for path in self.folder.iterdir() if _is_step(path))
            for old in steps[: -self.keep]:
                # A step that cannot be removed now is removed after a later one.
                shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def finish(self) -> None:
        """Wait until the write in progress is complete and sealed. Raises WriteError."""
        if self._sealing is not None:
            self._sealing.result()
            self._sealing = None

    def restore_latest(
        self, template: Any, announce: Callable[[str], None] = print
    ) -> tuple[int, Any, dict] | None:
        """(step, state, position) of the newest sound checkpoint, or None if there is none.

        A damaged step is announced and moved to `unusable`, beside the steps, because its place
        must be free when training comes to this step again.

        template: a state of arrays or shape structs with shardings; the checkpoint may have been
            saved on another mesh.

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
        """Move a damaged step away; process 0 does so and the others wait. Returns a message part.

        Raises:
            CheckpointError: the step cannot be moved.
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
        # Orbax caches the list of steps, so it has to read the folder again.
        self._manager.reload()
        return f"moved to {target}"

    @staticmethod
    def newest(folder: Path) -> tuple[int, dict[str, tuple[int, ...]]] | None:
        """(step, shapes of the trained parameters by path) of the newest readable step, or None.

        This reads only metadata and changes nothing, for checks before a run is touched.
        """
        steps = [int(path.name) for path in folder.glob("*") if _is_step(path)]
        for step in sorted(steps, reverse=True):
            try:
                state = folder.absolute() / str(step) / "state"
                metadata: Any = ocp.PyTreeCheckpointHandler().metadata(cast(Any, state))
                trained = metadata.tree["trained"]
                return step, {path: tuple(leaf.shape) for path, leaf in trained.items()}
            except (OSError, AttributeError, KeyError, TypeError, ValueError):
                continue  # The step is damaged; `restore_latest` will report it.
        return None

    def close(self) -> None:
        """Finish and release the background threads."""
        self.finish()
        self._sealer.shutdown()
        self._manager.close()

    def __enter__(self) -> StepCheckpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        # Finishing a write needs all processes, so it is skipped if one of them is lost.
        if error is None or not lost_peer(error):
            self.close()


def _is_step(path: Path) -> bool:
    """Whether the folder is named by a number of steps."""
    return path.name.isdecimal()
