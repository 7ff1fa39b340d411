"""Read `.bin`, `.pt` and `.pth` files with `torch.load(weights_only=True, mmap=True)`.

Nothing from the file is executed. torch is the optional extra `[convert]`, so it is imported only
when such a file is read.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from unimoe_jax.convert.source_tensor import ConvertError, Tensor, Tensors

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
OLDEST_TORCH = (2, 10)


def import_torch() -> Any:
    """Import torch, if it is new enough to read untrusted files.

    Raises:
        ConvertError: torch is not installed, or it is older than 2.10, whose restricted unpickler
            can be made to corrupt memory (GHSA-63cw-57p8-fm3p).
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
    """The dictionary in a torch file. Tensors are memory-mapped, and nothing is executed.

    Raises:
        ConvertError: the file is not a torch zip file, or it holds something else than tensors and
            plain values.
    """
    torch = import_torch()
    try:
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file") from None
    except Exception as error:  # a damaged or hostile pickle can raise any exception in torch
        raise ConvertError(f"{path}: refused: {_reason(error)}") from error
    if not isinstance(content, Mapping):
        raise ConvertError(f"{path}: expected a dictionary, found {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    """The reason why torch refuses a file, without its advice to load the file anyway."""
    text = str(error)
    if found := re.search(r"(?i)unsupported (?:global|operand|class).*", text):
        return f"it holds more than tensors: {found[0]}"
    if text.startswith("Weights only load failed"):
        return "it holds more than tensors, or is damaged"
    if "mmap can only be used" in text:
        return "it is not a torch zip file (older formats are not read)"
    return (text.strip().splitlines() or [repr(error)])[0]


def open_torch(path: Path, content: Mapping[str, Any] | None = None) -> Tensors:
    """Name -> tensor of a torch file that holds a flat dictionary of tensors.

    Args:
        content: the dictionary, if it is only a part of the file's content.

    Raises:
        ConvertError: as in `load_torch`; or an entry is not a tensor.
    """
    torch = import_torch()
    content = load_torch(path) if content is None else content
    tensors, ranges = {}, _mapped_ranges(path)
    for name, value in content.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise ConvertError(
                f"{path}: {name!r} is not a tensor but {type(value).__name__}; the file must hold "
                "a flat state dictionary"
            )
        dtype = str(value.dtype).removeprefix("torch.")
        read = _torch_reader(torch, value, path, name)
        release = partial(_release_torch, value, ranges)
        tensors[name] = Tensor(name, path, tuple(value.shape), dtype, read, release)
    return tensors


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """(first, last) addresses at which torch has mapped `path`, for `_release_torch`.

    Empty if pages of the mapping must not be dropped, because they differ from the file.
    """
    maps = Path("/proc/self/maps")
    with zipfile.ZipFile(path) as archive:
        records = [name for name in archive.namelist() if name.endswith("/byteorder")]
        order = archive.read(records[0]).decode() if records else "little"
    # torch swaps the bytes of a file of the other byte order in memory.
    if not maps.exists() or order != sys.byteorder:
        return []
    # A line of maps: "7f00-7fff r--p 00000000 08:01 1234 /path/of/file".
    mappings = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    name = str(path.resolve())
    spans = [fields[0].split("-") for fields in mappings if len(fields) == 6 and fields[5] == name]
    return [(int(first, 16), int(last, 16)) for first, last in spans]


def _release_torch(value: Any, ranges: Sequence[tuple[int, int]]) -> None:
    """Give back the pages of a tensor in torch's private mapping of the file.

    ranges: addresses of the mapping; a tensor elsewhere is a copy, whose pages would be lost.
    """
    storage = value.untyped_storage()
    # Only pages that hold nothing but this tensor: round the first up and the last down. Example
    # with pages of 4096 bytes: bytes 5000..20000 hold the whole pages 8192..16384.
    first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and any(begin <= first and last <= end for begin, end in ranges):
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _torch_reader(torch: Any, value: Any, path: Path, name: str) -> Callable[[], np.ndarray]:
    """A function that returns a torch tensor as a numpy array."""

    def read() -> np.ndarray:
        if value.layout != torch.strided or value.is_meta:
            raise ConvertError(f"{path}: tensor {name!r} is {value.layout}, not a dense tensor")
        flat = value.detach().contiguous()
        # numpy has no bfloat16, so torch cannot hand it over: pass the same bits as integers.
        if flat.dtype == torch.bfloat16:
            return flat.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return flat.numpy()

    return read
