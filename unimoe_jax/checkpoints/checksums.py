"""Checksums beside the files of a finished folder, checked before any of them is read.

Orbax restores a flipped bit without an error, so every finished folder carries a list of checksums.
They guard against accidents and not against attackers, so the fast hash XXH3 is enough. Each of
several processes hashes its share of the files, in one folder that all of them see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import jax
import xxhash

from unimoe_jax.parallel.distributed import all_texts, is_writer, wait_for_all

SUMS = "XXH3SUMS.json"
# Users may edit these files, so they carry no checksum.
UNSEALED = frozenset({"generation_config.json"})
AGAIN = "take another copy of the checkpoint, or write it again"
ORIGINAL = "copy this file again from the source, or import again"

new_sum = xxhash.xxh3_128
"""Starts a running checksum of the kind that `seal` stores, with the interface of hashlib."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or does not fit."""


def _names(folder: Path) -> set[str]:
    """All files below `folder` that carry a checksum, relative to it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in files} - {SUMS, *UNSEALED}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, new_sum).hexdigest()


def _sums(folder: Path, names: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """Checksums of this process's share of `names`."""
    share = sorted(names)[jax.process_index() :: jax.process_count()]
    # Hashing releases the interpreter lock, so several threads read a large checkpoint at a time.
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: known.get(name) or _digest(folder / name), share)
        return dict(zip(share, sums, strict=True))


def seal(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write the checksums of every file below `folder`.

    All processes call this when the files are complete; each of them hashes its share.

    known: checksums that were computed while the files were written; these files are not read
    again.
    """
    parts = all_texts("seal", json.dumps(_sums(folder, _names(folder), known)))
    if is_writer():
        sums = {name: value for part in parts for name, value in json.loads(part).items()}
        partial = folder / (SUMS + ".partial")
        partial.write_text(json.dumps(dict(sorted(sums.items())), indent=0))
        partial.rename(folder / SUMS)
    wait_for_all("sealed")


def verify(folder: Path) -> None:
    """Compare `folder` with its checksums. All processes call this, and each reads its share.

    Users may put files of their own beside the parameters. A file among the parameters that has no
    checksum is refused, because readers of arrays read every file that they find there.

    Raises:
        CheckpointError: there are no checksums because the write was interrupted, or a file
        differs.
            If one process finds a problem, all processes raise.
    """
    try:
        problem = _damage(folder)
    except CheckpointError as error:
        # Every process must reach all_texts() below, even with an error, or the others would hang.
        problem = str(error)
    problem = next(filter(None, all_texts("verify", problem)), None)
    if problem:
        raise CheckpointError(problem)


def check_files(folder: Path, *names: str) -> None:
    """Compare the files `names` with their checksums; without names, every sealed file beside the
    parameters. These files are small, so each process checks them by itself before it parses them.

    Raises:
        CheckpointError: there are no checksums, or a file differs.
    """
    expected = _expected(folder)
    for name in names or sorted(name for name in expected if "/" not in name):
        file = folder / name
        if name in expected and (not file.is_file() or _digest(file) != expected[name]):
            raise CheckpointError(_differs(folder, name))


def _damage(folder: Path) -> str:
    """The first problem with this process's share of the files or with the list of files; or ""."""
    expected, present = _expected(folder), _names(folder)
    # Folders of parameters. A file in one of them that was not sealed would be read as an array.
    folders = {name.split("/")[0] for name in expected if "/" in name}
    strange = {name for name in present - set(expected) if name.split("/")[0] in folders}
    if strange:
        return f"{folder / min(strange)}: is no part of this checkpoint; remove it"
    actual = _sums(folder, present & set(expected), {})
    wrong = {name for name, value in actual.items() if expected[name] != value}
    wrong |= set(expected) - present
    return _differs(folder, min(wrong)) if wrong else ""


def _expected(folder: Path) -> dict[str, str]:
    """Checksums by file name, as they were sealed."""
    try:
        sums = json.loads((folder / SUMS).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {SUMS}; the checkpoint is incomplete") from None
    except (ValueError, RecursionError):
        sums = None
    if not isinstance(sums, dict):
        raise CheckpointError(f"{folder / SUMS}: damaged, holds no list of checksums; {AGAIN}")
    return sums


def _differs(folder: Path, name: str) -> str:
    """The message about a file that differs from its checksum."""
    remedy = AGAIN if "/" in name else ORIGINAL
    return f"{folder / name}: damaged or missing (its checksum differs); {remedy}"
