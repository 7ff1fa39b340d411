"""Freed memory stays with the process, unless the user said otherwise."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from unimoe_jax.host_memory import keep_freed_memory
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
    """(whether anything was set, page faults of allocating 32 MiB once more)."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**own, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    said, faults = done.stdout.split()
    return said == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_freed_memory_is_used_again():
    done, faults = run()
    assert done
    assert faults < 100


def test_the_users_settings_win():
    done, _ = run(MALLOC_ARENA_MAX="4")
    assert not done
