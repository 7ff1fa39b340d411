"""Settings of the CPU backend, and what programs do before their first computation."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

from unimoe_jax.runtime import cpu
from unimoe_jax.runtime.cpu import prepare, settle_cpu


@pytest.fixture
def settings(monkeypatch) -> dict:
    """Settings of jax that a test changes; they are recorded and not made."""
    changed: dict = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    return changed


@pytest.mark.parametrize(
    ("user_flags", "several", "expected"),
    [
        ("", False, None),
        ("--xla_force_host_platform_device_count=1", False, None),
        ("", True, "64"),
        ("--xla_force_host_platform_device_count=8", False, "64"),
        ("--xla_force_host_platform_device_count=16", False, "128"),
    ],
)
def test_cpu_collectives_get_threads_and_an_order(
    user_flags, several, expected, settings, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", user_flags)
    for name in ("NPROC", "JAX_CPU_ENABLE_ASYNC_DISPATCH"):
        monkeypatch.delenv(name, raising=False)
    settle_cpu(several)
    assert os.environ.get("NPROC") == expected
    assert settings == ({} if expected is None else {"jax_cpu_enable_async_dispatch": False})
    scheduler = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    assert scheduler in os.environ["XLA_FLAGS"]

    # Settings of the user are kept.
    monkeypatch.setenv("XLA_FLAGS", f"{user_flags} {scheduler.replace('false', 'true')}")
    monkeypatch.setenv("NPROC", "3")
    settle_cpu(several)
    assert os.environ["NPROC"] == "3"
    assert scheduler not in os.environ["XLA_FLAGS"]


@pytest.mark.parametrize(("backend", "times"), [("cpu", 1), ("tpu", 0)])
def test_freed_memory_is_kept_on_cpus_only(backend, times, settings, monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: calls.append(backend))
    prepare()
    assert len(calls) == times
    assert settings == {}


def test_compiled_programs_are_kept_if_they_took_long_enough(settings, monkeypatch):
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: True)
    prepare(Path("cache/xla"), min_compile_seconds=0.2)
    assert settings == {
        "jax_compilation_cache_dir": "cache/xla",
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
