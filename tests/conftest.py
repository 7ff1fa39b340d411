"""One setting for all tests: CPU with eight virtual devices, exact matmuls, no silent promotion."""

from __future__ import annotations

import os

# Before jax is imported: the number of devices is fixed when its backend starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the parameter tables in tests/golden instead of comparing with them",
    )


@pytest.fixture
def update_golden(request) -> bool:
    """Whether recorded tables are to be rewritten."""
    return request.config.getoption("--update-golden")


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """Eight devices."""
    found = jax.devices()
    assert len(found) >= 8, f"{len(found)} devices; XLA_FLAGS = {os.environ['XLA_FLAGS']!r}"
    return found[:8]
