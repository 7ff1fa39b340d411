"""XLA settings of the CPU backend."""

from __future__ import annotations

import os
import re

import jax


def settle_cpu(several: bool = False) -> None:
    """Settings of XLA's CPU backend; comes before jax starts. What the user has set stays.

    Every program runs its parts one after the other, each on all cores: a train step then needs
    less memory, and small ones up to a tenth less time, than with parts side by side.

    With several virtual devices or several processes, collectives must not wait for each other for
    ever, which three defaults allow: two programs in flight may start theirs in different orders;
    so may two devices within one program; and a device's work may find every thread of the pool
    waiting in a collective for it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    scheduler = "--xla_cpu_enable_concurrency_optimized_scheduler"
    if scheduler not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {scheduler}=false".strip()
    devices = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    if not several and (not devices or int(devices[-1]) < 2):
        return
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    # The size of the thread pool; by default as many as there are cores or devices.
    os.environ.setdefault("NPROC", str(max(64, 8 * int(devices[-1] if devices else 1))))
