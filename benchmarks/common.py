"""Helpers of all benchmarks: run files, lengths of samples, hardware and versions, results."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = {"tiny": "configs/run/tiny.yaml", "small": "benchmarks/small.yaml"}


def machine() -> dict:
    """Describe the processor, cores, memory, load and versions for the result file."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].split(":")[1].strip() if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("jax", "jaxlib", "libtpu", "flax", "optax", "torch", "numpy", "grain")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
        "commit": commit(),
        "allocator": {
            key: value
            for key, value in os.environ.items()
            if key.startswith(("MALLOC_", "LD_PRELOAD"))
        },
    }


def installed(name: str) -> str | None:
    """Version of an installed package, or None.

    For example, PyTorch is missing where only TPU programs are compiled.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that is measured, with the suffix `-dirty` if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def peak_mib() -> float:
    """Largest resident size of this process so far, in MiB."""
    # ru_maxrss counts KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """Resident size of this process now, in MiB."""
    # The second number of statm is the resident size in pages.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def text_lengths(random: np.random.Generator, number: int, longest: int) -> np.ndarray:
    """Lengths of made-up instruction samples in tokens: log-normal around 120, at least 20."""
    return np.clip(random.lognormal(4.8, 0.7, number), 20, longest).astype(np.int64)


def save(path: Path, result: dict) -> None:
    """Write a result and replace a file that is already there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
