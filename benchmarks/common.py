"""What the benchmarks share: cases, weights and batches on disk, hardware and versions."""

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
ROWS, ROW_LENGTH, SEGMENTS = 4, 512, 4


def machine() -> dict:
    """Processor, cores, memory, load and versions, for the result file."""
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
    """Its version; None: not there, as PyTorch where only TPU programs are compiled."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit measured, with a mark if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def peak_mib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """Resident size of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def make_batch(vocab_size: int, image_size: int | None, patches: int) -> dict[str, np.ndarray]:
    """A full batch of random tokens, four samples to a row, half of the positions with targets.
    With `image_size`, each sample begins with one image."""
    random = np.random.default_rng(0)
    shape, length = (ROWS, ROW_LENGTH), ROW_LENGTH // SEGMENTS
    position = np.tile(np.arange(length, dtype=np.int32), (ROWS, SEGMENTS))
    segment = np.repeat(np.arange(1, SEGMENTS + 1, dtype=np.int32), length)
    batch = {
        "token_id_BT": random.integers(3, vocab_size, shape, dtype=np.int32),
        "target_BT": random.integers(3, vocab_size, shape, dtype=np.int32),
        "weight_BT": (position >= length // 2).astype(np.float32),
        "segment_BT": np.tile(segment, (ROWS, 1)),
        "position_BT": position,
        "modality_BT": np.zeros(shape, np.int32),
        "slot_BT": np.full(shape, -1, np.int32),
    }
    if image_size:
        images = ROWS * SEGMENTS
        pixels = (1, images, image_size, image_size, 3)
        batch["image_GIHWC"] = random.standard_normal(pixels, dtype=np.float32)
        inside = (position >= 1) & (position <= patches)
        image = np.arange(ROWS)[:, None] * SEGMENTS + batch["segment_BT"] - 1
        batch["slot_BT"] = np.where(inside, image * patches + position - 1, -1).astype(np.int32)
        batch["modality_BT"] = inside.astype(np.int32)
        batch["token_id_BT"][inside] = 0
    return batch


def save(path: Path, result: dict) -> None:
    """Write a result; what is there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
