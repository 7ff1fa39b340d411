"""Checksums beside the files of a finished folder, checked before any of them is read.

Orbax restores a flipped bit without an error. The sums are against accidents, so XXH3, which is
fast, will do. Several processes write and check their shares side by side, in one folder that all
of them see.
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
UNSEALED = frozenset({"generation_config.json"})  # there to be edited
AGAIN = "take another copy of the checkpoint, or write it again"
ORIGINAL = "copy this file again from the source, or import again"

new_sum = xxhash.xxh3_128
"""A running checksum as `seal` keeps them, with the interface of hashlib."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or does not fit."""


def _names(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in files} - {SUMS, *UNSEALED}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, new_sum).hexdigest()


def _sums(folder: Path, names: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """Checksums of this process's share of `names`."""
    share = sorted(names)[jax.process_index() :: jax.process_count()]
    # Hashing releases the interpreter: large checkpoints are read by several threads at a time.
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: known.get(name) or _digest(folder / name), share)
        return dict(zip(share, sums, strict=True))


def seal(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write the checksums of every file under `folder`; `known` ones were taken while writing.

    All processes call it when the files are there; each sums up its share of them.
    """
    parts = all_texts("seal", json.dumps(_sums(folder, _names(folder), known)))
    if is_writer():
        sums = {name: value for part in parts for name, value in json.loads(part).items()}
        partial = folder / (SUMS + ".partial")
        partial.write_text(json.dumps(dict(sorted(sums.items())), indent=0))
        partial.rename(folder / SUMS)
    wait_for_all("sealed")


def verify(folder: Path) -> None:
    """Compare `folder` with its checksums; all processes call it, each reads its share.

    Files that users put beside the parameters are none of its business; a file that nobody sealed
    among the parameters is refused, since readers of arrays look at whatever lies there.

    Raises:
        CheckpointError: no checksums (the write was interrupted), or a file that differs; on all
            processes when any of them finds it.
    """
    try:
        found = _damage(folder)
    except CheckpointError as error:  # the others wait for a word from this process
        found = str(error)
    found = next(filter(None, all_texts("verify", found)), None)
    if found:
        raise CheckpointError(found)


def check_files(folder: Path, *names: str) -> None:
    """Compare `names` with their checksums, or every sealed file beside the parameters.

    They are small: a process reads them alone, before it parses them.

    Raises:
        CheckpointError: no checksums, or a file that differs.
    """
    expected = _expected(folder)
    for name in names or sorted(name for name in expected if "/" not in name):
        file = folder / name
        if name in expected and (not file.is_file() or _digest(file) != expected[name]):
            raise CheckpointError(_differs(folder, name))


def _damage(folder: Path) -> str:
    """What is wrong with this process's share of the files, or with their number; else empty."""
    expected, there = _expected(folder), _names(folder)
    places = {name.split("/")[0] for name in expected if "/" in name}
    strange = {name for name in there - set(expected) if name.split("/")[0] in places}
    if strange:
        return f"{folder / min(strange)}: is no part of this checkpoint; remove it"
    actual = _sums(folder, there & set(expected), {})
    wrong = {name for name, value in actual.items() if expected[name] != value}
    wrong |= set(expected) - there
    return _differs(folder, min(wrong)) if wrong else ""


def _expected(folder: Path) -> dict[str, str]:
    """{file: checksum} as it was sealed."""
    try:
        sums = json.loads((folder / SUMS).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {SUMS}; the checkpoint is incomplete") from None
    except (ValueError, RecursionError):
        sums = None
    if not isinstance(sums, dict):
        raise CheckpointError(f"{folder / SUMS}: damaged, holds no list of checksums; {AGAIN}")
    # Checkpoints of earlier versions list them.
    return {name: value for name, value in sums.items() if name not in UNSEALED}


def _differs(folder: Path, name: str) -> str:
    what = f"{folder / name}: damaged or missing (its checksum differs)"
    return f"{what}; {AGAIN if '/' in name else ORIGINAL}"
