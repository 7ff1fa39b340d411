"""`import`: source folders -> an orbax checkpoint, its model.yaml, side files and manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from unimoe_jax.convert.family_plans import plan_of
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.plan import Resolution, read_slice, release_slice, resolve_plan
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
    """Recognise, check, convert; prints a table and a verdict.

    Raises:
        ConvertError: anything that does not fit; `folder` is not created then.
    """
    if folder.exists():
        raise ConvertError(f"{folder}: exists already; remove it or choose another --to")
    sources = recognise(paths)
    plan = plan_of(sources, options)
    resolution = resolve_plan(plan, dtype)
    for line in conversion_report(resolution):
        tell(line)
    sums: dict[Path, str] = {}
    finish = partial(_finish, resolution, sources, options, dtype, sums)
    write_checkpoint(folder, leaves_of(resolution), work_of(resolution, sources, sums), finish)
    tell(verdict(resolution, folder))
    return resolution


def leaves_of(resolution: Resolution) -> dict[str, Leaf]:
    """The targets as the writer wants them."""
    return {
        path: Leaf(target.shape, np_dtype(target.dtype), len(next(iter(target.fills))))
        for path, target in resolution.targets.items()
    }


def work_of(
    resolution: Resolution, sources: Sequence[SourceFolder], sums: dict[Path, str]
) -> Iterator[Work]:
    """Every chunk, in the order of the source files, each file's digest into `sums` before it.

    So a file is read from the disk once, even where the files do not fit into memory together.
    """
    plan = resolution.plan
    chunks: dict[Path, dict[str, list[Chunk]]] = {
        file: {} for source in sources for file in source_files(source)
    }
    for target in resolution.targets.values():
        for index, copy in target.fills.items():
            chunk = Chunk(
                target.path,
                index,
                partial(read_slice, plan, copy),
                partial(release_slice, plan, copy),
            )
            chunks[plan.tensor(copy.src).file].setdefault(copy.src, []).append(chunk)
    place = {f"{group}:{name}": n for group, ts in plan.groups.items() for n, name in enumerate(ts)}
    for file, members in chunks.items():
        yield partial(_digest, file, sums)
        for src in sorted(members, key=place.__getitem__):
            yield from members[src]


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
    """What was made of what. `shapes` and `moe_layers` let a stage take from the checkpoint."""
    plan = resolution.plan
    has_decoder = any("decoder/".startswith(part) for part in plan.parts)
    tensor_groups: dict[str, dict[str, Any]] = {}
    for path, target in resolution.targets.items():
        group = tensor_groups.setdefault(path.split("/")[0], {"sources": {}, "transforms": set()})
        for copy in target.fills.values():
            names = (copy.src, *((copy.adapter.a, copy.adapter.b) if copy.adapter else ()))
            for file in (str(plan.tensor(name).file) for name in names):
                group["sources"][file] = sums[file]
            group["transforms"].add(transform_of(copy))
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
        "tensor_groups": {
            name: {"sources": group["sources"], "transforms": sorted(group["transforms"])}
            for name, group in tensor_groups.items()
        },
        "overridden": dict(resolution.overridden),
        "unused": dict(resolution.excused),
        "shapes": {path: list(target.shape) for path, target in resolution.targets.items()},
        "dtypes": {path: target.dtype for path, target in resolution.targets.items()},
        "trained": [],
    }


def transform_of(copy) -> str:
    """One word or two on what happens to a tensor."""
    merged = f" + {copy.adapter.scale:g} B A" if copy.adapter else ""
    return (copy.rearrange or "copy") + merged


def conversion_report(resolution: Resolution) -> Iterator[str]:
    """source -> target, shape, dtype, transform: one line per parameter, layers folded."""
    plan = resolution.plan
    yield f"{'source':<78}  {'target':<58}  {'shape':<20}  {'dtype':<9} transform"
    for path, target in resolution.targets.items():
        copies = [target.fills[index] for index in sorted(target.fills)]
        more = f" … ({len(copies)})" if len(copies) > 1 else ""
        shape = "×".join(map(str, target.shape)) or "scalar"
        source = copies[0].src + more
        yield f"{source:<78}  {path:<58}  {shape:<20}  {target.dtype:<9} {transform_of(copies[0])}"
    for title, names in (("overridden", resolution.overridden), ("not used", resolution.excused)):
        reasons: dict[str, list[str]] = {}
        for name, why in names.items():
            why = f"a later file ({why.split(':')[0]}) holds it too" if title[0] == "o" else why
            reasons.setdefault(why, []).append(name)
        for why, members in reasons.items():
            yield f"{title}: {len(members)} tensors, e.g. {members[0]}: {why}"
    yield from (f"note: {note}" for note in plan.notes)


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
