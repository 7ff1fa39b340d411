"""Write a new checkpoint to disk slice by slice, with model.yaml, side files and a manifest.

`convert.writer` writes it beside its final place, seals it with checksums and then renames it.
"""

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
"""Path of a parameter -> its slices by leading index, for example (layer, expert)."""
Tell = Callable[[str], None]


def write(
    made: Made, base: Opened, sources: Sequence[Opened], folder: Path, command: str, tell: Tell
) -> None:
    """Write `made` to `folder` and report what was written.

    Args:
        made: content, settings and origins of the new checkpoint.
        base: the checkpoint that gives tokenizer, template and family.
        sources: all other checkpoints that `made` takes slices from.
        folder: the new checkpoint.
        command: the command line, for the manifest.
        tell: receives the lines of the report.

    Raises:
        ConvertError: `folder` exists, settings are missing, or layers do not fit together. A failed
            command leaves nothing behind.
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
    """Arrange the slices of `made` by parameter, in the layout that its MoE layers lead to."""
    stacked: Stacked = {}
    for layer_part, parts in made.content.items():
        path, layer_index = locate_part(layer_part, made.moe_layers)
        for expert_index, part in parts.items():
            stacked.setdefault(path, {})[(*layer_index, *expert_index)] = part
    return stacked


def leaf_of(path: str, parts: Mapping[tuple[int, ...], Part]) -> Leaf:
    """Describe the array that the slices of one parameter form.

    Its dtype is the dtype of the slices, or float32 if they differ. Example: slices of shape (8, 4)
    at (0, 0), (0, 1), (1, 0) and (1, 1) form an array of shape (2, 2, 8, 4).

    Raises:
        ConvertError: a slice is missing, or slices have different shapes.
    """
    # Indices start at 0, so the largest one gives the length of each stacked axis.
    index_axes = len(next(iter(parts)))
    stack_shape = tuple(1 + max(index[axis] for index in parts) for axis in range(index_axes))
    missing = set(itertools.product(*map(range, stack_shape))) - set(parts)
    shapes = {part.shape for part in parts.values()}
    if missing or len(shapes) > 1:
        reason = f"nothing at {sorted(missing)[:3]}" if missing else f"shapes {sorted(shapes)}"
        raise ConvertError(f"{path!r} cannot be stacked: {reason}")
    dtypes = {part.dtype for part in parts.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return Leaf((*stack_shape, *shapes.pop()), np_dtype(dtype), index_axes)


def chunks(stacked: Stacked) -> Iterator[Chunk]:
    """Yield every slice as a chunk, which is read when a thread writes it."""
    for path, parts in stacked.items():
        for index in sorted(parts):
            yield Chunk(path, index, parts[index].read, _nothing)


def _nothing() -> None:
    """Release nothing: the slices of checkpoints are no views of mapped files."""


def _finish(
    made: Made,
    base: Opened,
    sources: Sequence[Opened],
    command: str,
    text: str,
    leaves: Mapping[str, Leaf],
    folder: Path,
) -> dict[str, Any]:
    """Add model.yaml, tokenizer and processor files to `folder`, and return the manifest."""
    (folder / MODEL_FILE).write_text(text)
    checkpoint = with_tokenizer(base.checkpoint)
    for name, path in checkpoint.files.items():
        shutil.copyfile(path, folder / name)
    # The base may be among the sources, and a name stands for one checkpoint, so list each once.
    parents = {source.name: source for source in (base, *sources)}
    return {
        "family": checkpoint.manifest.get("family", ""),
        "template": checkpoint.template,
        "moe_layers": list(made.moe_layers),
        "lora_merged": True,
        "command": command,
        "parents": {name: str(source.checkpoint.path) for name, source in parents.items()},
        "hashes": {name: source.digests() for name, source in parents.items()},
        "experts": {module: list(names) for module, names in made.experts.items()},
        "shapes": {path: list(leaf.shape) for path, leaf in leaves.items()},
        "dtypes": {path: leaf.dtype.name for path, leaf in leaves.items()},
        "trained": [],
    }


def experts_report(made: Made) -> Iterator[str]:
    """Yield one line per module, part and origin, with its slices and parameters counted."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for layer_part, parts in made.content.items():
        module = layer_part.module or "elsewhere"
        for expert_index, part in parts.items():
            if expert_index:
                kind = f"expert {expert_index[0]}"
            else:
                kind = "router" if layer_part.is_router else ""
            row = rows.setdefault((module, kind, part.origin), [0, 0])
            row[0] += 1
            row[1] += int(np.prod(part.shape, dtype=np.int64))
    yield f"{'module':<12}{'part':<12}{'slices':>8}{'parameters':>18}  from"
    for (module, kind, origin), (count, size) in sorted(rows.items()):
        yield f"{module:<12}{kind:<12}{count:>8,}{size:>18,}  {origin}"
