"""`export`: parameters back into the names, layout and files of the PyTorch originals.

The same tables as for import, read backwards. What an import leaves out (text side of CLIP,
Whisper's own decoder, layers that are not used) is not made up: exported folders lack it.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unimoe_jax.convert.entry import Copy
from unimoe_jax.convert.layouts import Format, Layout, layout_of, unfit
from unimoe_jax.convert.opening import Checkpoint
from unimoe_jax.convert.reader import (
    SAFETENSORS_DTYPES,
    ConvertError,
    np_dtype,
    open_file,
)
from unimoe_jax.convert.torch_file import import_torch

Kind = Literal["safetensors", "bin"]
PARTIAL = ".partial"
SHARD_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: name, shape, dtype, and how to get it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np_dtype(self.dtype).itemsize


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    format_: Format,
    kind: Kind = "safetensors",
    tell: Callable[[str], None] = print,
) -> None:
    """Write `checkpoint` as PyTorch folders under `folder`.

    Raises:
        ConvertError: the format cannot hold the model, a parameter has no place in it, `folder`
            exists, or what was written does not read back. Nothing is left behind then.
    """
    if folder.exists():
        raise ConvertError(f"{folder}: exists already; remove it or choose another --to")
    layout = layout_of(checkpoint, format_)
    files = _pieces(checkpoint, layout, format_)
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, pieces in sorted(files.items()):
            write_file(partial / name, pieces, kind, tell, layout.wrapped.get(name))
        for name, content in layout.json_files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        for name, path in layout.side_files.items():
            shutil.copyfile(path, partial / name)
        partial.rename(folder)
    except OSError as error:
        raise ConvertError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    total = sum(piece.nbytes for pieces in files.values() for piece in pieces)
    tell(
        f"OK: {len(checkpoint.params)} parameters -> {len(files)} files, {total:,} bytes, {folder}"
    )


def _pieces(checkpoint: Checkpoint, layout: Layout, format_: Format) -> dict[str, list[Piece]]:
    """Tensors per file; every parameter must go somewhere."""
    files: dict[str, dict[str, Piece]] = {}
    placed: set[str] = set()
    for copy in layout.copies:
        parameter = checkpoint.params.get(copy.dst)
        group, name = copy.src.split(":", 1)
        if parameter is None or group not in layout.files:
            continue
        placed.add(copy.dst)
        shape = copy.source_shape(parameter.shape)
        piece = Piece(name, shape, parameter.dtype, _reader(parameter, copy))
        members = files.setdefault(layout.files[group], {})
        if name in members and not np.array_equal(members[name].read(), piece.read()):
            raise ConvertError(f"{layout.files[group]}: two different values for {name!r}")
        members[name] = piece
    lost = sorted(set(checkpoint.params) - placed)
    if lost:
        reason = f"format {format_} has no place for {len(lost)} parameters: {lost[:4]}"
        raise unfit(checkpoint, reason)
    return {file: list(members.values()) for file, members in files.items()}


def _reader(parameter: Any, copy: Copy) -> Callable[[], np.ndarray]:
    return lambda: copy.backward(parameter.read(copy.index))


# ------------------------------------------------------------------------------- files


def write_file(
    path: Path,
    pieces: list[Piece],
    kind: Kind,
    tell: Callable[[str], None],
    wrap: Mapping[str, Any] | None,
) -> None:
    """One logical file; folders' weights are sharded with an index. BEATs' stays a torch file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if wrap is not None:
        _write_torch(path, pieces, wrap)
        return
    sharded = path.name == "WEIGHTS"
    shards = list(_shards(pieces)) if sharded else [pieces]
    single = path.name if path.suffix == ".bin" else f"{path.name}.{kind}"
    names = _shard_names(len(shards), kind) if sharded else [single]
    for name, members in zip(names, shards, strict=True):
        target = path.with_name(name)
        (_write_torch if target.suffix == ".bin" else write_safetensors)(target, members)
        tell(f"{target.parent.name.removesuffix(PARTIAL)}/{name}: {len(members)} tensors")
    if len(shards) > 1:
        mapped = {p.name: name for name, shard in zip(names, shards, strict=True) for p in shard}
        total = sum(piece.nbytes for piece in pieces)
        stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
        index = {"metadata": {"total_size": total}, "weight_map": mapped}
        path.with_name(f"{stem}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    shard: list[Piece] = []
    for piece in pieces:
        if shard and sum(p.nbytes for p in shard) + piece.nbytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(piece)
    yield shard


def _shard_names(count: int, kind: Kind) -> list[str]:
    stem = "model" if kind == "safetensors" else "pytorch_model"
    if count == 1:
        return [f"{stem}.{kind}"]
    return [f"{stem}-{n:05d}-of-{count:05d}.{kind}" for n in range(1, count + 1)]


def write_safetensors(path: Path, pieces: list[Piece]) -> None:
    """Header, then one tensor after the other; every tensor is made contiguous first.

    Raises:
        ConvertError: a dtype that safetensors lacks, or the file does not read back.
    """
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": codes[np_dtype(piece.dtype)],
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + piece.nbytes],
        }
        offset += piece.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            value = np.ascontiguousarray(piece.read())
            if value.nbytes != piece.nbytes:
                raise ConvertError(f"{path}: {piece.name!r} has {value.nbytes} bytes")
            file.write(value.data if value.dtype.kind in "fiub" else value.tobytes())
    if set(open_file(path)) != {piece.name for piece in pieces}:
        raise ConvertError(f"{path}: does not read back")


def _write_torch(path: Path, pieces: list[Piece], wrap: Mapping[str, Any] | None = None) -> None:
    torch = import_torch()

    def tensor(piece: Piece) -> Any:
        value = np.array(piece.read())
        if piece.dtype == "bfloat16":
            return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(value)

    state = {piece.name: tensor(piece) for piece in pieces}
    try:
        torch.save(state if wrap is None else {**wrap, "model": state}, path)
    except RuntimeError as error:  # torch's writer does not say OSError when the disk is full
        raise ConvertError(f"{path}: cannot be written: {error}") from error
