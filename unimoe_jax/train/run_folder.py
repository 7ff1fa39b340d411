"""Claim the run directory: one run writes it at a time, and only with its own settings."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.checkpoints.locate import is_run
from unimoe_jax.config import RunConfig
from unimoe_jax.config.load import dump_config, run_dir
from unimoe_jax.parallel.distributed import is_writer, writer_first
from unimoe_jax.runtime.environment import env_info
from unimoe_jax.runtime.files import write_json_atomic, write_text_atomic

LOCK = ".lock"


class RunFolderError(RuntimeError):
    """The run directory cannot be used; the message says why."""


@contextlib.contextmanager
def claim(
    config: RunConfig, *, overwrite: bool, resume: bool, trains: bool = True
) -> Iterator[RunLayout]:
    """Lock the run's directory for the duration, with config.yaml and env.json written.

    The same settings continue a run. Other settings are refused with their differences, unless
    nothing has been trained, `resume` accepts them, or `overwrite` starts over. Overwriting removes
    what a run has written and nothing else, so callers check everything that can be checked before.
    Process 0 does all that before the others go on; the others check that they see the same
    directory. trains: False if no stage is left to train; env.json then stays that of the training.

    Raises:
        RunFolderError: another run uses the directory, it cannot be written, it holds other
            settings or no run at all, or the processes do not share its file system.
        DistributedError: on the other processes, if process 0 could not claim it.
    """
    with contextlib.ExitStack() as stack:
        yield writer_first("run directory", lambda: _open(config, overwrite, resume, trains, stack))


def _open(
    config: RunConfig, overwrite: bool, resume: bool, trains: bool, stack: contextlib.ExitStack
) -> RunLayout:
    layout = RunLayout(run_dir(config))
    if is_writer():
        stack.enter_context(_locked(config, layout, overwrite, resume))
        if trains or not layout.environment.exists():
            write_json_atomic(layout.environment, env_info())
    elif not layout.config.exists() or layout.config.read_text() != dump_config(config):
        raise RunFolderError(
            f"output {layout.folder}: does not hold what process 0 has written there; all hosts "
            "must see the same directory, with the same settings"
        )
    return layout


@contextlib.contextmanager
def _locked(config: RunConfig, layout: RunLayout, overwrite: bool, resume: bool) -> Iterator[None]:
    """Hold the lock of the run directory, and write the settings into it."""
    folder = layout.folder
    if overwrite:
        _check_is_run(layout)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise RunFolderError(f"output {folder}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"output {folder}: another run is writing it") from None
        if overwrite:
            _remove_run(layout)
        if not resume and _has_trained(layout):
            _check_settings(layout.config, dump_config(config))
        with _settings_of_what_trains(layout, dump_config(config)):
            yield


@contextlib.contextmanager
def _settings_of_what_trains(layout: RunLayout, text: str) -> Iterator[None]:
    """Write config.yaml. If the run fails before its first step, put the old file back, so that the
    next command is not refused because of settings that were never used."""
    path, progress = layout.config, _progress(layout)
    old = _read(path) if path.exists() else text
    write_text_atomic(path, text)
    try:
        yield
    except Exception:
        if old != text and _progress(layout) == progress:
            write_text_atomic(path, old)
        raise


def _check_is_run(layout: RunLayout) -> None:
    """Refuse to overwrite anything but a run, because `output` may name a folder by mistake."""
    if not layout.folder.is_dir():
        return
    names = {path.name for path in layout.folder.iterdir()} - {LOCK}
    if names and not is_run(layout.folder):
        raise RunFolderError(
            f"output {layout.folder}: holds {min(names)!r} and is no run directory (config.yaml "
            "with checkpoints or env.json); --overwrite leaves it as it is; set another `output`"
        )


def _remove_run(layout: RunLayout) -> None:
    """Remove everything that a run writes into its directory, and nothing else."""
    try:
        for path in (layout.folder / name for name in sorted(layout.entries)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"{error.filename}: cannot be removed ({error.strerror})") from error


def _has_trained(layout: RunLayout) -> bool:
    """Whether the directory holds results that other settings would be mixed with."""
    return layout.metrics.exists() or bool(layout.saved())


def _progress(layout: RunLayout) -> tuple[int, list[Path]]:
    """Grows with every step: the size of the records, and the folders of checkpoints."""
    size = layout.metrics.stat().st_size if layout.metrics.exists() else 0
    return size, layout.saved()


def _read(path: Path) -> str:
    """Settings as they were written. Bytes that a damaged disk has changed into invalid UTF-8 are
    escaped, so that they show as a difference instead of ending the program."""
    return path.read_text(encoding="utf-8", errors="backslashreplace")


def _check_settings(path: Path, text: str) -> None:
    """Raises RunFolderError with the first differences if `path` holds other settings."""
    if not path.exists():
        return
    difference = difflib.unified_diff(_read(path).splitlines(), text.splitlines(), lineterm="", n=0)
    changes = [line for line in difference if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    if changes:
        shown = "\n".join("  " + line for line in changes[:20])
        raise RunFolderError(
            f"output {path.parent}: holds a run with other settings:\n{shown}\n"
            "add --resume to continue it with the new ones, --overwrite to start over, or set "
            "another `output` or `name`"
        )
