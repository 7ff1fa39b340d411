"""The run directory: who may write it, and whether it belongs to these settings."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from unimoe_jax.config import RunConfig
from unimoe_jax.config.load import dump_config, run_dir
from unimoe_jax.parallel.distributed import is_writer, writer_first
from unimoe_jax.runtime.environment import env_info
from unimoe_jax.runtime.files import write_json_atomic, write_text_atomic


class RunFolderError(RuntimeError):
    """The run directory cannot be used."""


WRITTEN = (
    *("config.yaml", "env.json", "metrics.jsonl", "summary.json", "report.html"),
    *("checkpoints", "params", "plots", "tb"),
)
"""What a run writes in its directory, and what `--overwrite` removes."""


@contextlib.contextmanager
def claim(
    config: RunConfig, *, overwrite: bool, resume: bool, trains: bool = True
) -> Iterator[Path]:
    """The run's directory, locked for the duration, with config.yaml and env.json written.

    The same settings continue a run. Other settings are refused with their differences, unless
    nothing has been trained, `resume` accepts them, or `overwrite` starts over, which removes what
    a run has written and nothing else. So whatever can be checked is checked before. Process 0 does
    all that before the others go on; they check that they see the same directory. Where nothing is
    left to train (not `trains`), env.json stays that of the training.

    Raises:
        RunFolderError: in use by another run, not writable, other settings, nothing that a run has
            written where it is to be overwritten, or on a file system that the processes do not
            share.
        DistributedError: on the other processes, where process 0 could not claim it.
    """
    with contextlib.ExitStack() as stack:
        yield writer_first("run directory", lambda: _open(config, overwrite, resume, trains, stack))


def _open(
    config: RunConfig, overwrite: bool, resume: bool, trains: bool, stack: contextlib.ExitStack
) -> Path:
    folder = run_dir(config)
    if is_writer():
        stack.enter_context(_locked(config, folder, overwrite, resume))
        if trains or not (folder / "env.json").exists():
            write_json_atomic(folder / "env.json", env_info())
    elif not (folder / "config.yaml").exists() or (
        folder / "config.yaml"
    ).read_text() != dump_config(config):
        raise RunFolderError(
            f"output {folder}: does not hold what process 0 has written there; all hosts must see "
            "the same directory, with the same settings"
        )
    return folder


@contextlib.contextmanager
def _locked(config: RunConfig, folder: Path, overwrite: bool, resume: bool) -> Iterator[None]:
    if overwrite:
        _check_is_run(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RunFolderError(f"output {folder}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"output {folder}: another run is writing it") from None
        if overwrite:
            _remove_run(folder)
        if not resume and _has_trained(folder):
            _check_settings(folder / "config.yaml", dump_config(config))
        with _settings_of_what_trains(folder, dump_config(config)):
            yield


@contextlib.contextmanager
def _settings_of_what_trains(folder: Path, text: str) -> Iterator[None]:
    """config.yaml holds `text` from here on, unless an error comes before anything was trained with
    it: a command that was refused must not make the one before it `other settings`."""
    path = folder / "config.yaml"
    before, trained = _read(path) if path.exists() else text, _trained(folder)
    write_text_atomic(path, text)
    try:
        yield
    except Exception:
        if before != text and _trained(folder) == trained:
            write_text_atomic(path, before)
        raise


def _check_is_run(folder: Path) -> None:
    """`--overwrite` is for run directories: `output` may name any folder by mistake."""
    if not folder.is_dir():
        return
    found = {path.name for path in folder.iterdir()} - {".lock"}
    if found and not ("config.yaml" in found and found & {"checkpoints", "env.json"}):
        raise RunFolderError(
            f"output {folder}: holds {min(found)!r} and is no run directory (config.yaml with "
            "checkpoints or env.json); --overwrite leaves it as it is; set another `output`"
        )


def _remove_run(folder: Path) -> None:
    try:
        for path in (folder / name for name in WRITTEN):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"{error.filename}: cannot be removed ({error.strerror})") from error


def _has_trained(folder: Path) -> bool:
    """Whether there is anything that other settings would mix with."""
    return (folder / "metrics.jsonl").exists() or any((folder / "checkpoints").glob("*/*/*"))


def _trained(folder: Path) -> tuple[int, list[Path]]:
    """What changes with every step: the size of the records, and the folders of checkpoints."""
    path = folder / "metrics.jsonl"
    size = path.stat().st_size if path.exists() else 0
    return size, sorted((folder / "checkpoints").glob("*/*/*"))


def _read(path: Path) -> str:
    """Settings as they were written; what a damaged disk has made of them shows as a difference."""
    return path.read_text(encoding="utf-8", errors="backslashreplace")


def _check_settings(path: Path, text: str) -> None:
    if not path.exists():
        return
    changes = [
        line
        for line in difflib.unified_diff(
            _read(path).splitlines(), text.splitlines(), lineterm="", n=0
        )
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    if changes:
        shown = "\n".join("  " + line for line in changes[:20])
        raise RunFolderError(
            f"output {path.parent}: holds a run with other settings:\n{shown}\n"
            "add --resume to continue it with the new ones, --overwrite to start over, or set "
            "another `output` or `name`"
        )
