"""Lets a program on the CPU backend keep the memory that it frees, or get it back in large pages.

XLA allocates the temporaries of every program anew. glibc hands large blocks back to the kernel as
soon as they are free, so each training step would fault in, and have zeroed, hundreds of megabytes.
Blocks over 64 MiB that threads other than the first allocate go back whatever is set: those should
come in huge pages, 2 MiB per fault instead of 4 KiB.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

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
    if _user_decides():
        return False
    accepted = [ctypes.CDLL(None).mallopt(key, value) for key, value in SETTINGS.items()]
    return all(accepted)


HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment in which glibc (2.35 or later) asks for huge pages; read when a process starts."""
HUGE_PAGES_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Runs this process's command once more in its place, with the heap in huge pages.

    Only where the kernel gives them to who asks (elsewhere it always or never does), and where the
    user has set neither `GLIBC_TUNABLES` nor a `MALLOC_…` variable. Comes before anything else.
    """
    if _user_decides() or "GLIBC_TUNABLES" in os.environ or not HUGE_PAGES_ENABLED.is_file():
        return
    if "[madvise]" in HUGE_PAGES_ENABLED.read_text():
        os.environ.update(HUGE_PAGES)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _user_decides() -> bool:
    """Whether the allocator is not glibc's, or the user has set it."""
    if not sys.platform.startswith("linux"):
        return True
    if any(name.startswith("MALLOC_") for name in os.environ):
        return True
    return not hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
