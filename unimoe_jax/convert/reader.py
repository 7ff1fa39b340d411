"""Source checkpoints, read lazily and tensor by tensor.

Safetensors files are memory-mapped with an own header parser, so that no framework is needed and a
hostile header cannot allocate anything. `.bin`, `.pt` and `.pth` files go through
`torch.load(weights_only=True, mmap=True)`, which executes nothing; torch is the optional extra
`[convert]`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import operator
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
OLDEST_TORCH = (2, 10)
MAX_HEADER = 100_000_000
MAX_AXES = 32
SAFETENSORS_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class ConvertError(RuntimeError):
    """A checkpoint that cannot be read or does not fit; names file, tensor and shapes."""


def _nothing() -> None:
    """For tensors whose pages need not be given back."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a source file.

    `read` returns a read-only view of the mapped file; `release` gives the view's pages back to the
    system, so that what has been converted does not count as memory of this process. The view
    stays valid: pages that are read again come from the file.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray] = field(repr=False, compare=False)
    release: Callable[[], None] = field(default=_nothing, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np_dtype(self.dtype).itemsize


Tensors = dict[str, Tensor]


def np_dtype(name: str) -> np.dtype:
    """numpy dtype of a name, `bfloat16` included."""
    return np.dtype(getattr(ml_dtypes, name, name))


class JsonSettings(dict[str, Any]):
    """The entries of a configuration file; asking for one that is not there names file and key."""

    def __init__(self, path: Path, content: Mapping[str, Any]):
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ConvertError(f"{self.path}: has no {key!r}")


def read_json(path: Path) -> JsonSettings:
    """A JSON object.

    Raises:
        ConvertError: missing, not JSON, or not an object.
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
    """Tensors of a safetensors file; every offset is checked against the file's size.

    Raises:
        ConvertError: truncated, overlapping, too long, of unknown dtype, or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ConvertError(f"{path}: truncated, {size} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise ConvertError(
                f"{path}: the header claims {length} bytes, the file has {size}; damaged or hostile"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_repetition)
            entries = [(k, v) for k, v in header.items() if k != "__metadata__"]
        except (ValueError, AttributeError, RecursionError) as error:
            raise ConvertError(f"{path}: the header is not JSON: {error}") from error
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data, tensors, end = 8 + length, {}, 0
    for name, entry in sorted(entries, key=lambda item: _begin(path, *item)):
        dtype, shape, (first, last) = _entry(path, name, entry)
        expected = math.prod(shape) * dtype.itemsize
        if first != end or last - first != expected:
            raise ConvertError(
                f"{path}: tensor {name!r} of shape {shape} {dtype} needs {expected} bytes from "
                f"{end}, the header says {first}..{last}"
            )
        if data + last > size:
            raise ConvertError(
                f"{path}: truncated: tensor {name!r} of shape {shape} ends at byte {data + last}, "
                f"the file has {size}"
            )
        end = last
        read = _mapped(view, data + first, shape, dtype)
        release = partial(_release, view, data + first, last - first)
        tensors[name] = Tensor(name, path, shape, str(dtype), read, release)
    if data + end != size:
        raise ConvertError(f"{path}: {size - data - end} bytes at the end belong to no tensor")
    return tensors


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _begin(path: Path, name: str, entry: Any) -> int:
    try:
        return operator.index(entry["data_offsets"][0])
    except (TypeError, KeyError, IndexError) as error:
        raise ConvertError(f"{path}: tensor {name!r} has a malformed header entry") from error


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    try:
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        shape = tuple(operator.index(size) for size in entry["shape"])
        first, last = (operator.index(offset) for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise ConvertError(
            f"{path}: tensor {name!r} has a malformed header entry: {entry!r:.120}"
        ) from error
    # Sizes beside a 0 as well: numpy makes no array of more axes or bytes, even an empty one.
    most = np.iinfo(np.int64).max // dtype.itemsize
    if len(shape) > MAX_AXES or min(shape, default=0) < 0 or math.prod(filter(None, shape)) > most:
        raise ConvertError(f"{path}: tensor {name!r} has shape {shape!s:.120}")
    return dtype, shape, (first, last)


def _mapped(view: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: np.dtype):
    count = int(np.prod(shape, dtype=np.int64))
    return lambda: np.frombuffer(view, dtype, count, offset).reshape(shape)


def _release(view: mmap.mmap, offset: int, nbytes: int) -> None:
    page = offset - offset % mmap.PAGESIZE
    if nbytes and hasattr(view, "madvise"):
        view.madvise(mmap.MADV_DONTNEED, page, offset + nbytes - page)


# ------------------------------------------------------------------------------------ torch


def import_torch() -> Any:
    """torch, if it is new enough to read untrusted files.

    Raises:
        ConvertError: not installed, or older than 2.10 (memory corruption in its restricted
            unpickler, GHSA-63cw-57p8-fm3p).
    """
    try:
        import torch
    except ImportError as error:
        raise ConvertError(
            "reading .bin and .pt files needs torch: pip install 'unimoe_jax[convert]' "
            "(or convert the files to safetensors)"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise ConvertError(
            f"torch {torch.__version__} is too old to read untrusted files safely; "
            f"pip install 'torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}'"
        )
    return torch


def load_torch(path: Path) -> Mapping[str, Any]:
    """The dictionary in a torch file, tensors memory-mapped, nothing executed.

    Raises:
        ConvertError: not a torch zip file, or it holds anything but tensors and plain values.
    """
    torch = import_torch()
    try:
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file") from None
    except Exception as error:  # whatever a damaged or hostile pickle provokes in torch
        raise ConvertError(f"{path}: refused: {_reason(error)}") from error
    if not isinstance(content, Mapping):
        raise ConvertError(f"{path}: expected a dictionary, found {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    """What torch found, without its advice to load the file all the same."""
    text = str(error)
    if found := re.search(r"(?i)unsupported (?:global|operand|class).*", text):
        return f"it holds more than tensors: {found[0]}"
    if text.startswith("Weights only load failed"):
        return "it holds more than tensors, or is damaged"
    if "mmap can only be used" in text:
        return "it is no torch zip file (older formats are not read)"
    return (text.strip().splitlines() or [repr(error)])[0]


def open_torch(path: Path, content: Mapping[str, Any] | None = None) -> Tensors:
    """Tensors of a torch file's flat dictionary (or of `content`, part of one).

    Raises:
        ConvertError: as `load_torch`; or an entry is no tensor.
    """
    torch = import_torch()
    content = load_torch(path) if content is None else content
    tensors, ranges = {}, _mapped_ranges(path)
    for name, value in content.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise ConvertError(
                f"{path}: {name!r} is no tensor but {type(value).__name__}; a flat state "
                "dictionary is expected"
            )
        dtype = str(value.dtype).removeprefix("torch.")
        read = _torch_reader(torch, value, path, name)
        release = partial(_release_torch, value, ranges)
        tensors[name] = Tensor(name, path, tuple(value.shape), dtype, read, release)
    return tensors


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Addresses where torch has mapped `path` and not written: what `_release_torch` may drop."""
    maps = Path("/proc/self/maps")
    with zipfile.ZipFile(path) as archive:
        records = [name for name in archive.namelist() if name.endswith("/byteorder")]
        order = archive.read(records[0]).decode() if records else "little"
    if not maps.exists() or order != sys.byteorder:  # bytes were swapped in memory
        return []
    mine = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    name = str(path.resolve())
    spans = [fields[0].split("-") for fields in mine if len(fields) == 6 and fields[5] == name]
    return [(int(first, 16), int(last, 16)) for first, last in spans]


def _release_torch(value: Any, ranges: Sequence[tuple[int, int]]) -> None:
    """As `_release`, for torch's private mapping of the file."""
    storage = value.untyped_storage()
    # Only whole pages inside: the rest belongs to neighbours.
    first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and any(begin <= first and last <= end for begin, end in ranges):
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _torch_reader(torch: Any, value: Any, path: Path, name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if value.layout != torch.strided or value.is_meta:
            raise ConvertError(f"{path}: tensor {name!r} is {value.layout}, not a dense tensor")
        flat = value.detach().contiguous()
        if flat.dtype == torch.bfloat16:
            return flat.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return flat.numpy()

    return read


# ---------------------------------------------------------------------------------- folders


def open_file(path: Path) -> Tensors:
    """Tensors of one file, by its suffix.

    Raises:
        ConvertError: missing, unreadable, or of an unknown kind.
    """
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return open_torch(path)
    raise ConvertError(f"{path}: unknown kind of file; expected .safetensors, .bin, .pt or .pth")


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a Hugging Face folder: an index if there is one, safetensors preferred.

    Raises:
        ConvertError: none, or an index that names files outside the folder.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            mapped = read_json(index).get("weight_map")
            if not isinstance(mapped, dict) or not mapped:
                raise ConvertError(f"{index}: has no `weight_map`")
            names = sorted({str(name) for name in mapped.values()})
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
    """Tensors of a Hugging Face folder over all its shards; an index must agree with them.

    Raises:
        ConvertError: a shard is missing, a tensor is in two shards, or the index lists others.
    """
    files, tensors = weight_files(folder), {}
    for file in files:
        for name, tensor in open_file(file).items():
            if name in tensors:
                raise ConvertError(f"{file}: tensor {name!r} is also in {tensors[name].file}")
            tensors[name] = tensor
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file() and files[0].suffix in index.name:
            listed = read_json(index)["weight_map"]
            for name in sorted(set(listed) ^ set(tensors)):
                where = "the index but in no shard" if name in listed else "a shard but not indexed"
                raise ConvertError(f"{index}: tensor {name!r} is in {where}")
            for name, tensor in tensors.items():
                if listed[name] != tensor.file.name:
                    raise ConvertError(
                        f"{index}: tensor {name!r} should be in {listed[name]!r}, but is in "
                        f"{tensor.file.name!r}"
                    )
    return tensors


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[str]:
    """Names below `prefix`."""
    return (name for name in tensors if name.startswith(prefix))


def require(where: str, config: Mapping[str, Any], **only: Any) -> None:
    """Refuse a setting with another value than the `only` one; one that is not there, or null, is
    that one.

    Raises:
        ConvertError: naming `where`, the setting and both values.
    """
    for key, value in only.items():
        if (given := config.get(key)) not in (None, value):
            raise ConvertError(f"{where}: {key} {given!r} is not supported; it must be {value}")
