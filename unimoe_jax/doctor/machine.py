"""CPU cores, memory, and the shared memory through which worker processes hand over batches."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from unimoe_jax.doctor.checks import Check, format_bytes

MACHINE = "machine"
LITTLE_SHARED_MEMORY = 2**30
"""Containers get 64 MiB by default, and one batch of images may take more."""


def check_machine(
    shared_memory: Path = Path("/dev/shm"),
    memory_limit: Path = Path("/sys/fs/cgroup/memory.max"),
) -> list[Check]:
    """What this process may use. The paths are arguments so that tests can name other ones."""
    checks = [_check_cores(), _check_memory(memory_limit)]
    if shared_memory.is_dir():  # only Linux has it
        checks.append(_check_shared_memory(shared_memory))
    return checks


def _check_cores() -> Check:
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    value = f"{usable} cores" if usable == total else f"{usable} of {total} cores may be used"
    return Check(MACHINE, "CPU", "ok", value)


def _check_memory(memory_limit: Path) -> Check:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return Check(MACHINE, "memory", "ok", "unknown on this system")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    value = format_bytes(total)
    if available := _available_memory():
        value += f", {format_bytes(available)} available"
    # A container may be allowed less than the machine has.
    limit = memory_limit.read_text().strip() if memory_limit.is_file() else "max"
    if limit.isdecimal() and int(limit) < total:
        value += f"; this container is limited to {format_bytes(int(limit))}"
    return Check(MACHINE, "memory", "ok", value)


def _available_memory() -> int | None:
    """Bytes that programs can still take, as Linux estimates it; None elsewhere."""
    path = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.is_file() else None
    return int(match[1]) * 1024 if match else None


def _check_shared_memory(folder: Path) -> Check:
    usage = shutil.disk_usage(folder)
    value = f"{format_bytes(usage.total)}, {format_bytes(usage.free)} free"
    if usage.free >= LITTLE_SHARED_MEMORY:
        return Check(MACHINE, str(folder), "ok", value)
    remedy = (
        "worker processes hand over batches through it: start the container with `--shm-size 8g`, "
        "or read with threads (data.loader.workers=0)"
    )
    return Check(MACHINE, str(folder), "warning", f"{value} is little", remedy)
