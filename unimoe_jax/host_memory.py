"""Lets a program on the CPU backend keep the memory that it frees.

XLA allocates the temporaries of every program anew. glibc hands large blocks back to the kernel as
soon as they are free, so each training step would fault in, and have zeroed, hundreds of megabytes.
"""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt(3): parameter numbers of glibc's <malloc.h>, and the values that keep freed memory.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
SETTINGS = {
    M_MMAP_MAX: 0,  # no block of its own mapping, which would be unmapped when freed
    M_TRIM_THRESHOLD: -1,  # never shrink the heap
    M_TOP_PAD: 256 * 2**20,  # bytes; grow it in large steps
}


def keep_freed_memory() -> bool:
    """Sets glibc's allocator so for this process; True if it did.

    Does nothing elsewhere than on Linux with glibc, or where the user has set any `MALLOC_…`
    variable: then the user decides. The process holds its largest size until it ends.
    """
    if not sys.platform.startswith("linux") or any(
        name.startswith("MALLOC_") for name in os.environ
    ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    accepted = [library.mallopt(key, value) for key, value in SETTINGS.items()]
    return all(accepted)
