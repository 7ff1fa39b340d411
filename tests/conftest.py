"""Settings of all tests: a CPU with eight virtual devices, exact matmuls, no silent promotion."""

from __future__ import annotations

import os
from pathlib import Path

# jax reads these flags when it starts its backend. Most of the tests' time is compilation, so XLA
# optimises little.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
_user_flags = os.environ.get("XLA_FLAGS")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{_FLAGS} {_user_flags or ''}".strip()

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Start the backend now and restore the user's flags, so that programs that tests start do not
# inherit the flags of the tests.
jax.devices()
if _user_flags is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = _user_flags


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the parameter tables in tests/golden instead of comparing with them",
    )


# Slow files with few tests. pytest-xdist would run them last, and the other workers would wait for
# the worker that runs the last one. With `--no-loadscope-reorder` files run in the order of
# collection, so these files are put first.
LONG = ("tiny_layouts", "tiny_run", "cumo_tiny", "multihost", "sharded_start", "layouts", "launch")


def pytest_collection_modifyitems(items):
    first = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(LONG)))


@pytest.fixture
def update_golden(request) -> bool:
    """Whether to rewrite recorded tables instead of comparing with them."""
    return request.config.getoption("--update-golden")


@pytest.fixture(scope="session")
def devices() -> list:
    """Eight virtual devices."""
    devices = jax.devices()
    assert len(devices) >= 8, f"{len(devices)} devices, but the tests need eight"
    return devices[:8]


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A cache folder for all runs of the session: one embedded data set, compiled programs."""
    return tmp_path_factory.mktemp("cache")
