"""Read source checkpoints lazily, tensor by tensor.

Safetensors files are memory-mapped. Their header has a parser here, so that no framework is needed
and a hostile header cannot allocate memory. `torch_file` reads the files of torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import operator
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_jax.convert.source_tensor import ConvertError, Tensor, Tensors, np_dtype
from unimoe_jax.convert.torch_file import TORCH_SUFFIXES, open_torch

MAX_HEADER = 100_000_000  # bytes
MAX_AXES = 32
# Name in a safetensors header -> numpy dtype.
SAFETENSORS_DTYPES: Mapping[str, np.dtype] = {
    "F64": np_dtype("float64"),
    "F32": np_dtype("float32"),
    "F16": np_dtype("float16"),
    "BF16": np_dtype("bfloat16"),
    "I64": np_dtype("int64"),
    "I32": np_dtype("int32"),
    "I16": np_dtype("int16"),
    "I8": np_dtype("int8"),
    "U8": np_dtype("uint8"),
    "BOOL": np_dtype("bool"),
}


class JsonSettings(dict[str, Any]):
    """The entries of a JSON file. A missing key raises a ConvertError that names file and key."""

    def __init__(self, path: Path, content: Mapping[str, Any]):
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ConvertError(f"{self.path}: has no {key!r}")


def read_json(path: Path) -> JsonSettings:
    """The JSON object in a file.

    Raises:
        ConvertError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return JsonSettings(path, content)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------ safetensors


def open_safetensors(path: Path) -> Tensors:
    """Name -> tensor of a safetensors file, without reading any of them.

    The format is 8 bytes with the header's length N (little-endian), N bytes of JSON, then the
    tensors. Tensors have to follow each other without gaps and to end with the file, so that no two
    can overlap and none can lie outside.

    Raises:
        ConvertError: the file is truncated, too long, or not a safetensors file, or a tensor
            overlaps another one or has an unknown dtype.
    """
    # The header, whose claimed length is checked before it is read.
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ConvertError(f"{path}: truncated: {size} bytes are too few for safetensors")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise ConvertError(
                f"{path}: the header claims {length} bytes, but the file has {size}; it is damaged "
                "or hostile"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_repetition)
            entries = [(k, v) for k, v in header.items() if k != "__metadata__"]
        except (ValueError, AttributeError, RecursionError) as error:
            raise ConvertError(f"{path}: the header is not JSON: {error}") from error
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # The tensors, in the order of their bytes; offsets count from the end of the header.
    data, tensors, end = 8 + length, {}, 0
    for name, entry in sorted(entries, key=lambda item: _begin(path, *item)):
        dtype, shape, (first, last) = _entry(path, name, entry)
        expected = math.prod(shape) * dtype.itemsize
        if first != end or last - first != expected:
            raise ConvertError(
                f"{path}: tensor {name!r} of shape {shape} {dtype} needs {expected} bytes from "
                f"{end}, but the header says {first}..{last}"
            )
        if data + last > size:
            raise ConvertError(
                f"{path}: truncated: tensor {name!r} of shape {shape} ends at byte {data + last}, "
                f"but the file has {size} bytes"
            )
        end = last
        read = _mapped(view, data + first, shape, dtype)
        release = partial(_release, view, data + first, last - first)
        tensors[name] = Tensor(name, path, shape, str(dtype), read, release)
    if data + end != size:
        raise ConvertError(f"{path}: {size - data - end} bytes at the end belong to no tensor")
    return tensors


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ; json would silently keep the last of two equal keys."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _begin(path: Path, name: str, entry: Any) -> int:
    """First byte of a tensor, from its header entry."""
    try:
        return operator.index(entry["data_offsets"][0])
    except (TypeError, KeyError, IndexError) as error:
        raise ConvertError(f"{path}: tensor {name!r} has a malformed header entry") from error


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """(dtype, shape, (first byte, end)) from a header entry, in which anything may be written."""
    try:
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        shape = tuple(operator.index(size) for size in entry["shape"])
        first, last = (operator.index(offset) for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise ConvertError(
            f"{path}: tensor {name!r} has a malformed header entry: {entry!r:.120}"
        ) from error
    # numpy cannot make an array with more axes or bytes. It refuses an empty array, too, if its
    # other sizes are that large, so leave sizes of 0 out of the product.
    max_numbers = np.iinfo(np.int64).max // dtype.itemsize
    too_large = math.prod(filter(None, shape)) > max_numbers
    if len(shape) > MAX_AXES or min(shape, default=0) < 0 or too_large:
        raise ConvertError(
            f"{path}: tensor {name!r} has shape {shape!s:.120}, which no array can have"
        )
    return dtype, shape, (first, last)


def _mapped(view: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: np.dtype):
    """A function that returns the view of a tensor's bytes as an array."""
    count = int(np.prod(shape, dtype=np.int64))
    return lambda: np.frombuffer(view, dtype, count, offset).reshape(shape)


def _release(view: mmap.mmap, offset: int, nbytes: int) -> None:
    """Give back the pages that hold `nbytes` bytes from `offset`."""
    # madvise needs the beginning of a page; not every system has it.
    page = offset - offset % mmap.PAGESIZE
    if nbytes and hasattr(view, "madvise"):
        view.madvise(mmap.MADV_DONTNEED, page, offset + nbytes - page)


# ---------------------------------------------------------------------------------- folders


def open_file(path: Path) -> Tensors:
    """Name -> tensor of one file, whose suffix says how to read it.

    Raises:
        ConvertError: the file is missing, unreadable, or of an unknown kind.
    """
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return open_torch(path)
    raise ConvertError(f"{path}: unknown kind of file; expected .safetensors, .bin, .pt or .pth")


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a Hugging Face folder, from its index if it has one.

    Safetensors files are preferred to torch files, and an index to a single file.

    Raises:
        ConvertError: there are no weights, or the index names files outside the folder.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            mapped = read_json(index).get("weight_map")
            if not isinstance(mapped, dict) or not mapped:
                raise ConvertError(f"{index}: has no `weight_map`")
            names = sorted({str(name) for name in mapped.values()})
            # A hostile index must not make this process read other files.
            inside = [name for name in names if Path(name).name == name]
            if inside != names:
                raise ConvertError(f"{index}: names files outside its folder: {names}")
            return [folder / name for name in names]
        if single.is_file():
            return [single]
    raise ConvertError(
        f"{folder}: no weights: neither model.safetensors(.index.json) nor "
        "pytorch_model.bin(.index.json)"
    )


def open_folder(folder: Path) -> Tensors:
    """Name -> tensor of a Hugging Face folder, over all of its shards.

    Raises:
        ConvertError: a shard is missing, a tensor is in two shards, or the index does not agree
            with the shards.
    """
    # All shards.
    files, tensors = weight_files(folder), {}
    for file in files:
        for name, tensor in open_file(file).items():
            if name in tensors:
                raise ConvertError(f"{file}: tensor {name!r} is also in {tensors[name].file}")
            tensors[name] = tensor
    # The index, which must list the same tensors in the same files.
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file() and files[0].suffix in index.name:
            listed = read_json(index)["weight_map"]
            for name in sorted(set(listed) ^ set(tensors)):
                where = "the index but in no shard" if name in listed else "a shard, not indexed"
                raise ConvertError(f"{index}: tensor {name!r} is in {where}")
            for name, tensor in tensors.items():
                if listed[name] != tensor.file.name:
                    raise ConvertError(
                        f"{index}: tensor {name!r} should be in {listed[name]!r}, but is in "
                        f"{tensor.file.name!r}"
                    )
    return tensors


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[str]:
    """The names that begin with `prefix`."""
    return (name for name in tensors if name.startswith(prefix))


def require(where: str, config: Mapping[str, Any], **supported: Any) -> None:
    """Refuse a setting whose value this package does not implement.

    A missing or null setting counts as supported, because the originals then use that value.

    Args:
        where: the file, for the message.
        supported: setting -> the only supported value.

    Raises:
        ConvertError: a setting has another value; the message names `where`, the setting and both
            values.
    """
    for key, value in supported.items():
        if (setting := config.get(key)) not in (None, value):
            raise ConvertError(f"{where}: {key} {setting!r} is not supported; it must be {value}")
