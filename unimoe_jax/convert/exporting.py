"""Export a checkpoint: write parameters with the names, layout and files of the PyTorch originals.

An export runs the tables of an import backwards. An import leaves out the text side of CLIP,
Whisper's original decoder and layers that are not used; an export does not make them up, so the
exported folders lack them.
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
from unimoe_jax.convert.opening import Checkpoint, Parameter
from unimoe_jax.convert.reader import (
    SAFETENSORS_DTYPES,
    ConvertError,
    np_dtype,
    open_file,
)
from unimoe_jax.convert.torch_file import import_torch

Kind = Literal["safetensors", "bin"]
PARTIAL = ".partial"
"""Suffix of the folder that becomes the export when it is complete."""
SHARD_BYTES = 2_000_000_000
"""Largest size of a shard, unless a single tensor is larger."""


@dataclass(frozen=True)
class Piece:
    """A tensor that will be written: its name, shape and dtype, and a function that reads it."""

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

    Args:
        checkpoint: the parameters and settings to be written.
        folder: the new folder.
        format_: whose folders and names the export has.
        kind: the file format of the weights.
        tell: receives a line for every file, and a summary at the end.

    Raises:
        ConvertError: the format cannot hold the model, a parameter has no place in it, `folder`
            exists, or a written file does not read back. A failed export leaves nothing behind.
    """
    if folder.exists():
        raise ConvertError(f"{folder}: exists already; remove it or choose another --to")
    layout = layout_of(checkpoint, format_)
    files = _pieces(checkpoint, layout, format_)
    # Write beside `folder` and rename at the end, so that an interrupted export leaves no folder
    # that looks complete.
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
    """Assign a piece to a file for every slice of every parameter.

    Raises:
        ConvertError: a parameter has no file, or two parameters have different values for the same
            tensor.
    """
    files: dict[str, dict[str, Piece]] = {}
    placed: set[str] = set()
    for copy in layout.copies:
        parameter = checkpoint.params.get(copy.dst)
        group, name = copy.src.split(":", 1)
        # The tables list every tensor that the originals may have; skip those of other models.
        if parameter is None or group not in layout.files:
            continue
        placed.add(copy.dst)
        shape = copy.source_shape(parameter.shape)
        piece = Piece(name, shape, parameter.dtype, _reader(parameter, copy))
        # Several slices may come from one tensor, for example a table that two modules share. They
        # can only be exported if they are still equal.
        members = files.setdefault(layout.files[group], {})
        if name in members and not np.array_equal(members[name].read(), piece.read()):
            raise ConvertError(
                f"{layout.files[group]}: the checkpoint has two different values for {name!r}"
            )
        members[name] = piece
    lost = sorted(set(checkpoint.params) - placed)
    if lost:
        reason = f"format {format_} has no place for {len(lost)} parameters: {lost[:4]}"
        raise unfit(checkpoint, reason)
    return {file: list(members.values()) for file, members in files.items()}


def _reader(parameter: Parameter, copy: Copy) -> Callable[[], np.ndarray]:
    return lambda: copy.backward(parameter.read(copy.index))


# ------------------------------------------------------------------------------- files


def write_file(
    path: Path,
    pieces: list[Piece],
    kind: Kind,
    tell: Callable[[str], None],
    wrap: Mapping[str, Any] | None,
) -> None:
    """Write the tensors of one entry of `Layout.files`.

    Args:
        path: the file without a suffix, or a folder's WEIGHTS, which become shards with an index.
        pieces: the tensors.
        kind: the file format, unless `path` ends in .bin.
        tell: receives one line per file.
        wrap: if given, write a torch file that holds these entries beside `model` (BEATs).

    Raises:
        ConvertError: a file cannot be written or does not read back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if wrap is not None:
        _write_torch(path, pieces, wrap)
        return
    if path.name == "WEIGHTS":
        shards = list(_shards(pieces))
        names = _shard_names(len(shards), kind)
    else:
        shards = [pieces]
        names = [path.name if path.suffix == ".bin" else f"{path.name}.{kind}"]
    for name, members in zip(names, shards, strict=True):
        target = path.with_name(name)
        if target.suffix == ".bin":
            _write_torch(target, members)
        else:
            write_safetensors(target, members)
        tell(f"{target.parent.name.removesuffix(PARTIAL)}/{name}: {len(members)} tensors")
    if len(shards) > 1:
        _write_index(path.parent, names, shards, kind)


def _write_index(folder: Path, names: list[str], shards: list[list[Piece]], kind: Kind) -> None:
    """Write the file by which transformers finds the shard of every tensor."""
    shard_of = {
        piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard
    }
    total = sum(piece.nbytes for shard in shards for piece in shard)
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Cut the tensors, in their order, into shards of at most SHARD_BYTES."""
    shard: list[Piece] = []
    for piece in pieces:
        if shard and sum(p.nbytes for p in shard) + piece.nbytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(piece)
    yield shard


def _shard_names(count: int, kind: Kind) -> list[str]:
    """The names that transformers gives to shards, e.g. model-00001-of-00002.safetensors."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    if count == 1:
        return [f"{stem}.{kind}"]
    return [f"{stem}-{n:05d}-of-{count:05d}.{kind}" for n in range(1, count + 1)]


def write_safetensors(path: Path, pieces: list[Piece]) -> None:
    """Write a safetensors file: its header, then the bytes of one tensor after the other.

    Only one tensor is in memory at a time. Format: the length of the header as a little-endian
    uint64, the header as JSON, padded with spaces to a multiple of 8 bytes, and the tensors in C
    order at the offsets that the header lists (safetensors' README).

    Raises:
        ConvertError: a tensor does not have the announced size, or the file does not read back.
    """
    # The header needs the place of every tensor, which follows from the sizes alone.
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
                raise ConvertError(
                    f"{path}: {piece.name!r} has {value.nbytes} bytes instead of {piece.nbytes}"
                )
            # Python's buffer protocol has no bfloat16, so these bytes have to be copied.
            file.write(value.data if value.dtype.kind in "fiub" else value.tobytes())
    if set(open_file(path)) != {piece.name for piece in pieces}:
        raise ConvertError(f"{path}: the written file does not read back")


def _write_torch(path: Path, pieces: list[Piece], wrap: Mapping[str, Any] | None = None) -> None:
    """Write a torch file with a dictionary of tensors, or with `wrap` and `model`, that dictionary.

    Raises:
        ConvertError: torch is not installed, or the file cannot be written.
    """
    torch = import_torch()

    def tensor(piece: Piece) -> Any:
        value = np.array(piece.read())
        # torch cannot read numpy's bfloat16, so pass the bits as integers.
        if piece.dtype == "bfloat16":
            return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(value)

    state = {piece.name: tensor(piece) for piece in pieces}
    try:
        torch.save(state if wrap is None else {**wrap, "model": state}, path)
    except RuntimeError as error:  # torch's writer raises no OSError when the disk is full
        raise ConvertError(f"{path}: cannot be written: {error}") from error
