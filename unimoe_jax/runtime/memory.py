"""Keep memory that a program on the CPU backend frees, or get it back in large pages.

XLA allocates the temporary arrays of every program when the program runs. glibc returns large
blocks to the kernel as soon as they are freed, so without these settings each training step would
get hundreds of megabytes from the kernel again, page by page, and the kernel would zero every page.

`keep_freed_memory` prevents that for most blocks. Blocks over 64 MiB that other threads than the
first one allocate are returned whatever is set, so `restart_with_huge_pages` makes them cheaper:
a huge page is 2 MiB per page fault instead of 4 KiB.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# mallopt(3): parameter numbers of glibc's <malloc.h>, and the values that keep freed memory.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
SETTINGS = {
    M_MMAP_MAX: 0,  # allocate no block by mmap, because such a block is unmapped when it is freed
    M_TRIM_THRESHOLD: -1,  # never shrink the heap
    M_TOP_PAD: 256 * 2**20,  # bytes: grow the heap in large steps
}


def keep_freed_memory() -> bool:
    """Set glibc's allocator so that it keeps freed memory for this process. True if it was set.

    Nothing is set on systems other than Linux with glibc, or if the user has set any `MALLOC_…`
    variable, because then the user decides. The process holds its largest size until it ends.
    """
    if _user_decides():
        return False
    accepted = [ctypes.CDLL(None).mallopt(key, value) for key, value in SETTINGS.items()]
    return all(accepted)


HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment in which glibc (2.35 or later) asks for huge pages; read when a process starts."""
HUGE_PAGES_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""The file with the kernel's setting: huge pages always, if asked for (madvise), or never."""


def restart_with_huge_pages() -> None:
    """Replace this process by the same command, with its heap in huge pages.

    This happens only if the kernel gives huge pages to processes that ask for them (with its other
    settings, always and never, asking changes nothing), and if the user has set neither
    `GLIBC_TUNABLES` nor a `MALLOC_…` variable. Call it before anything else, because all work done
    before is lost.
    """
    if _user_decides() or "GLIBC_TUNABLES" in os.environ or not HUGE_PAGES_ENABLED.is_file():
        return
    # The setting in force stands in brackets, as in "always [madvise] never".
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
