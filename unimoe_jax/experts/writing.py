"""A made checkpoint onto disk, slice by slice: beside its place, sealed, renamed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_jax.convert.importing import MODEL_FILE
from unimoe_jax.convert.opening import with_tokenizer
from unimoe_jax.convert.reader import ConvertError, np_dtype
from unimoe_jax.convert.writer import Chunk, Leaf, write_checkpoint
from unimoe_jax.experts.making import Made
from unimoe_jax.experts.opening import Opened, Part, model_text
from unimoe_jax.params.layer_parts import locate_part

Stacked = dict[str, dict[tuple[int, ...], Part]]
Tell = Callable[[str], None]


def write(
    made: Made, base: Opened, sources: Sequence[Opened], folder: Path, command: str, tell: Tell
) -> None:
    """Write `made` to `folder` and tell what was done.

    Raises:
        ConvertError: `folder` exists, settings are missing, layers do not fit together. Nothing is
            left behind then.
    """
    text = model_text(made.config, str(base.checkpoint.path))
    stacked = stack(made)
    leaves = {path: leaf_of(path, parts) for path, parts in stacked.items()}
    finish = partial(_finish, made, base, sources, command, text, leaves)
    write_checkpoint(folder, leaves, chunks(stacked), finish)
    for line in experts_report(made):
        tell(line)
    numbers = sum(leaf.size for leaf in leaves.values())
    nbytes = sum(leaf.nbytes for leaf in leaves.values())
    tell(f"OK: {len(leaves)} parameters, {numbers:,} numbers, {nbytes:,} bytes -> {folder}")


def stack(made: Made) -> Stacked:
    """{path: {leading index: part}} in this package's layout."""
    stacked: Stacked = {}
    for member, parts in made.content.items():
        path, outer = locate_part(member, made.moe_layers)
        for inner, part in parts.items():
            stacked.setdefault(path, {})[(*outer, *inner)] = part
    return stacked


def leaf_of(path: str, parts: Mapping[tuple[int, ...], Part]) -> Leaf:
    """The array that the parts of one parameter form.

    Where their dtypes differ it is float32.

    Raises:
        ConvertError: a hole, or parts of different shapes.
    """
    lead = tuple(1 + max(index[axis] for index in parts) for axis in range(len(min(parts))))
    missing = set(itertools.product(*map(range, lead))) - set(parts)
    shapes = {part.shape for part in parts.values()}
    if missing or len(shapes) > 1:
        what = f"nothing at {sorted(missing)[:3]}" if missing else f"shapes {sorted(shapes)}"
        raise ConvertError(f"{path!r} cannot be stacked: {what}")
    dtypes = {part.dtype for part in parts.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return Leaf((*lead, *shapes.pop()), np_dtype(dtype), len(lead))


def chunks(stacked: Stacked) -> Iterator[Chunk]:
    """Every slice, to be read when its turn comes."""
    for path, parts in stacked.items():
        for index in sorted(parts):
            yield Chunk(path, index, parts[index].read, _nothing)


def _nothing() -> None:
    """Slices of checkpoints hold no pages that could be given back."""


def _finish(
    made: Made,
    base: Opened,
    sources: Sequence[Opened],
    command: str,
    text: str,
    leaves: Mapping[str, Leaf],
    folder: Path,
) -> dict[str, Any]:
    (folder / MODEL_FILE).write_text(text)
    spoken = with_tokenizer(base.checkpoint)
    for name, path in spoken.files.items():
        shutil.copyfile(path, folder / name)
    every = {source.name: source for source in (base, *sources)}
    return {
        "family": spoken.manifest.get("family", ""),
        "template": spoken.template,
        "moe_layers": list(made.moe_layers),
        "lora_merged": True,
        "command": command,
        "parents": {name: str(source.checkpoint.path) for name, source in every.items()},
        "hashes": {name: source.digests() for name, source in every.items()},
        "experts": {module: list(names) for module, names in made.experts.items()},
        "shapes": {path: list(leaf.shape) for path, leaf in leaves.items()},
        "dtypes": {path: leaf.dtype.name for path, leaf in leaves.items()},
        "trained": [],
    }


def experts_report(made: Made) -> Iterator[str]:
    """One line per module and expert: how many parameters it has, and where they come from."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for member, parts in made.content.items():
        module = member.module or "elsewhere"
        for inner, part in parts.items():
            what = f"expert {inner[0]}" if inner else ("router" if member.is_router else "")
            row = rows.setdefault((module, what, part.origin), [0, 0])
            row[0] += 1
            row[1] += int(np.prod(part.shape, dtype=np.int64))
    yield f"{'module':<12}{'part':<12}{'slices':>8}{'parameters':>18}  from"
    for (module, what, origin), (count, size) in sorted(rows.items()):
        yield f"{module:<12}{what:<12}{count:>8,}{size:>18,}  {origin}"
