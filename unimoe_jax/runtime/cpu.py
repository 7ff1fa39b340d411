"""XLA's settings for CPUs, and what every program does before its first computation.

`settle_cpu` comes first, because XLA reads its settings when jax starts its backend. `prepare`
comes next and starts the backend.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import jax

from unimoe_jax.runtime.memory import keep_freed_memory


def settle_cpu(several: bool = False) -> None:
    """Choose settings of XLA's CPU backend, before jax starts it. Settings of the user are kept.

    Every program runs its operations one after the other, each on all cores, and not several
    operations side by side. A train step then needs less memory, and a small one takes up to a
    tenth less time.

    Collectives of several virtual devices or processes can wait for each other for ever, for three
    reasons: two programs in flight may start their collectives in different orders, two devices may
    do so within one program, and all threads of the pool may wait in a collective for a device that
    has no thread left. Therefore operations are not reordered, programs run one at a time, and the
    thread pool is made large enough.

    Args:
        several: whether several processes work together.
    """
    # Run the operations of a program in one order, the same on every device.
    flags = os.environ.get("XLA_FLAGS", "")
    scheduler = "--xla_cpu_enable_concurrency_optimized_scheduler"
    if scheduler not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {scheduler}=false".strip()

    # The other two settings are needed only if several devices or processes work together.
    devices = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    if not several and (not devices or int(devices[-1]) < 2):
        return
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    # NPROC is the size of XLA's thread pool. By default it is the number of cores or devices.
    os.environ.setdefault("NPROC", str(max(64, 8 * int(devices[-1] if devices else 1))))


def prepare(cache: Path | None = None, min_compile_seconds: float = 1.0) -> None:
    """Do what every program does before its first computation; comes after `settle_cpu`.

    On the CPU backend, memory that is freed stays with the process (see `runtime.memory`). With
    `cache`, compiled programs are kept in that folder, so that the next start need not compile them
    again.

    Args:
        cache: folder of compiled programs; None leaves jax's setting as it is.
        min_compile_seconds: keep only programs whose compilation takes at least this long.
    """
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    if cache is not None:
        cache_programs(cache, min_compile_seconds)


def cache_programs(folder: Path, min_compile_seconds: float) -> None:
    """Keep compiled programs in `folder` if their compilation takes `min_compile_seconds`."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_compile_seconds)
