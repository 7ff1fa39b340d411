"""Freed memory stays with the process, unless the user has set the allocator."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from unimoe_jax.runtime.memory import keep_freed_memory
import numpy as np
print(keep_freed_memory())
def faults():
    np.full(32 * 2**20, 1, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults()
before = faults()
print(faults() - before)
"""


def run(**variables: str) -> tuple[bool, int]:
    """(whether the allocator was set, page faults of allocating 32 MiB a second time)."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    was_set, faults = done.stdout.split()
    return was_set == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_freed_memory_is_used_again():
    was_set, faults = run()
    assert was_set
    assert faults < 100


def test_the_users_settings_win():
    was_set, _ = run(MALLOC_ARENA_MAX="4")
    assert not was_set


RESTARTED = """
import os, sys
from pathlib import Path
from unimoe_jax.runtime import memory
memory.HUGE_PAGES_ENABLED = Path(sys.argv[1])
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[2:], flush=True)
memory.restart_with_huge_pages()
print("end")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
@pytest.mark.parametrize(
    ("kernel", "variables", "restarts"),
    [
        ("always [madvise] never", {}, True),
        ("[always] madvise never", {}, False),
        ("always [madvise] never", {"MALLOC_ARENA_MAX": "4"}, False),
        ("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.check=0"}, False),
    ],
)
def test_the_same_command_starts_again_with_huge_pages(tmp_path, kernel, variables, restarts):
    (tmp_path / "enabled").write_text(kernel)
    unset = ("MALLOC_", "GLIBC_TUNABLES")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
    command = [sys.executable, "-c", RESTARTED, str(tmp_path / "enabled"), "one", "two words"]
    done = subprocess.run(
        command, env={**kept, **variables}, capture_output=True, text=True, check=True
    )
    first, *again, end = done.stdout.splitlines()
    assert end == "end"
    assert first.endswith("one two words")
    pid = first.split()[0]
    expected = f"{pid} glibc.malloc.hugetlb=1 one two words"
    assert again == ([expected] if restarts else [])
