"""Import PyTorch folders: write an orbax checkpoint with model.yaml, side files and a manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from unimoe_jax.convert.entry import Copy
from unimoe_jax.convert.family_plans import plan_of
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.plan import (
    Resolution,
    read_slice,
    release_slice,
    resolve_plan,
)
from unimoe_jax.convert.reader import ConvertError, np_dtype, sha256
from unimoe_jax.convert.recognise import SourceFolder, licences, recognise, source_files
from unimoe_jax.convert.writer import Chunk, Leaf, Work, write_checkpoint

MODEL_FILE = "model.yaml"
Tell = Callable[[str], None]


def import_checkpoint(
    paths: Sequence[Path],
    folder: Path,
    options: Options = Options(),
    dtype: str = "source",
    tell: Tell = print,
) -> Resolution:
    """Recognise the source folders, check them, and convert them to a checkpoint.

    Args:
        paths: the source folders; together they hold one model.
        folder: the new checkpoint.
        options: how adapters, rounding and unread layers are treated.
        dtype: of the parameters: "source", "float32" or "bfloat16".
        tell: receives every line of the report and, at the end, the verdict.

    Returns:
        Which source tensors filled which parameters.

    Raises:
        ConvertError: a source does not fit, or `folder` exists or cannot be written. A failed
            import does not create `folder`.
    """
    if folder.exists():
        raise ConvertError(f"{folder}: exists already; remove it or choose another --to")
    # Decide which tensor fills which parameter before anything is written.
    sources = recognise(paths)
    plan = plan_of(sources, options)
    resolution = resolve_plan(plan, dtype)
    for line in conversion_report(resolution):
        tell(line)
    # Writing the chunks fills `sums`, so the manifest is made after the last chunk.
    sums: dict[Path, str] = {}
    finish = partial(_finish, resolution, sources, options, dtype, sums)
    write_checkpoint(folder, leaves_of(resolution), work_of(resolution, sources, sums), finish)
    tell(verdict(resolution, folder))
    return resolution


def leaves_of(resolution: Resolution) -> dict[str, Leaf]:
    """Describe every parameter to the writer: shape, dtype, and how many axes a chunk indexes."""
    return {
        path: Leaf(target.shape, np_dtype(target.dtype), len(next(iter(target.fills))))
        for path, target in resolution.targets.items()
    }


def work_of(
    resolution: Resolution, sources: Sequence[SourceFolder], sums: dict[Path, str]
) -> Iterator[Work]:
    """Yield the work of an import, one source file after the other.

    For each file, first comes a function that puts the file's SHA-256 into `sums`, then all chunks
    that are made from the file. So each file is read from the disk once: the digest brings the file
    into the page cache and the chunks find it there, even if all files together exceed the memory.
    """
    plan = resolution.plan
    chunks: dict[Path, dict[str, list[Chunk]]] = {
        file: {} for source in sources for file in source_files(source)
    }
    # Sort the chunks by source file and source tensor.
    for target in resolution.targets.values():
        for index, copy in target.fills.items():
            chunk = Chunk(
                target.path,
                index,
                partial(read_slice, plan, copy),
                partial(release_slice, plan, copy),
            )
            chunks[plan.existing(copy.src).file].setdefault(copy.src, []).append(chunk)
    # Within a file, keep the order in which the file lists its tensors.
    position = {
        f"{group}:{name}": number
        for group, tensors in plan.groups.items()
        for number, name in enumerate(tensors)
    }
    for file, chunks_by_tensor in chunks.items():
        yield partial(_digest, file, sums)
        for src in sorted(chunks_by_tensor, key=position.__getitem__):
            yield from chunks_by_tensor[src]


def _digest(file: Path, sums: dict[Path, str]) -> None:
    sums[file] = sha256(file)


def _finish(
    resolution: Resolution,
    sources: Sequence[SourceFolder],
    options: Options,
    dtype: str,
    sums: Mapping[Path, str],
    partial_folder: Path,
) -> dict[str, Any]:
    """Add model.yaml and the side files to the unfinished folder, and return the manifest."""
    plan = resolution.plan
    text = yaml.safe_dump({"model": dict(plan.config)}, sort_keys=False)
    (partial_folder / MODEL_FILE).write_text(text)
    for name, path in plan.files.items():
        shutil.copyfile(path, partial_folder / name)
    digests = {str(file): digest for file, digest in sums.items()}
    return manifest(resolution, sources, options, dtype, digests)


def manifest(
    resolution: Resolution,
    sources: Sequence[SourceFolder],
    options: Options,
    dtype: str,
    sums: Mapping[str, str],
) -> dict[str, Any]:
    """Record which sources, options and transforms made the checkpoint.

    A later stage reads `shapes` and `moe_layers` to start from the checkpoint.
    """
    plan = resolution.plan
    has_decoder = any("decoder/".startswith(part) for part in plan.parts)
    return {
        "family": plan.family,
        "moe_layers": list(plan.model.decoder.moe_layers()) if has_decoder else [],
        "lora_merged": options.lora == "merge",
        "options": asdict(options),
        "asked_dtype": dtype,
        "notes": list(plan.notes),
        "parents": {source.role: str(source.path) for source in sources},
        "licences": {source.role: licences(source.path) for source in sources},
        "source_configs": {source.role: dict(source.config) for source in sources},
        "tensor_groups": _tensor_groups(resolution, sums),
        "overridden": dict(resolution.overridden),
        "unused": dict(resolution.excused),
        "shapes": {path: list(target.shape) for path, target in resolution.targets.items()},
        "dtypes": {path: target.dtype for path, target in resolution.targets.items()},
        "trained": [],
    }


def _tensor_groups(resolution: Resolution, sums: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """List the source files with their digests, and the transforms, of each top-level module.

    The groups are the first names of the parameter paths: "vision", "decoder", …
    """
    sources: dict[str, dict[str, str]] = {}
    transforms: dict[str, set[str]] = {}
    for path, target in resolution.targets.items():
        group = path.split("/")[0]
        group_sources = sources.setdefault(group, {})
        group_transforms = transforms.setdefault(group, set())
        for copy in target.fills.values():
            adapter_names = (copy.adapter.a, copy.adapter.b) if copy.adapter else ()
            for name in (copy.src, *adapter_names):
                file = str(resolution.plan.existing(name).file)
                group_sources[file] = sums[file]
            group_transforms.add(transform_of(copy))
    return {
        group: {"sources": sources[group], "transforms": sorted(transforms[group])}
        for group in sources
    }


def transform_of(copy: Copy) -> str:
    """Name the transform of a tensor: "copy" or its rearrangement, and a merged adapter's scale."""
    merged = f" + {copy.adapter.scale:g} B A" if copy.adapter else ""
    return (copy.rearrange or "copy") + merged


def conversion_report(resolution: Resolution) -> Iterator[str]:
    """Yield the lines of the report: a table of parameters, then the tensors left out, then notes.

    The table has one line per parameter with source, target, shape, dtype and transform. A
    parameter that stacks several layers shows its first source and the number of sources.
    """
    yield f"{'source':<78}  {'target':<58}  {'shape':<20}  {'dtype':<9} transform"
    for path, target in resolution.targets.items():
        copies = [target.fills[index] for index in sorted(target.fills)]
        more = f" … ({len(copies)})" if len(copies) > 1 else ""
        shape = "×".join(map(str, target.shape)) or "scalar"
        source = copies[0].src + more
        yield f"{source:<78}  {path:<58}  {shape:<20}  {target.dtype:<9} {transform_of(copies[0])}"
    # `overridden` holds the source that replaced each tensor, as "group:name".
    overridden_reasons = {
        name: f"a later file ({source.split(':')[0]}) holds the same parameter"
        for name, source in resolution.overridden.items()
    }
    yield from _grouped_by_reason("overridden", overridden_reasons)
    yield from _grouped_by_reason("not used", resolution.excused)
    yield from (f"note: {note}" for note in resolution.plan.notes)


def _grouped_by_reason(title: str, reasons: Mapping[str, str]) -> Iterator[str]:
    """One line per reason, with the number of tensors and the first of them as an example."""
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names_by_reason.setdefault(reason, []).append(name)
    for reason, names in names_by_reason.items():
        yield f"{title}: {len(names)} tensors, e.g. {names[0]}: {reason}"


def verdict(resolution: Resolution, folder: Path) -> str:
    """The last line of an import."""
    targets = resolution.targets.values()
    count = sum(int(np.prod(target.shape, dtype=np.int64)) for target in targets)
    return (
        f"OK: {resolution.plan.family}: {len(resolution.targets)} parameters filled, {count:,} "
        f"numbers, {sum(target.nbytes for target in targets):,} bytes, "
        f"{len(resolution.overridden)} source tensors overridden, {len(resolution.excused)} "
        f"excused, none left over -> {folder}"
    )
