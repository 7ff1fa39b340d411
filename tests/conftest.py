"""One setting for all tests: CPU with eight virtual devices, exact matmuls, no silent promotion."""

from __future__ import annotations

import os
from pathlib import Path

# Read when jax starts its backend. Most of the tests' time is compilation, so it optimises little.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
_given = os.environ.get("XLA_FLAGS")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{_FLAGS} {_given or ''}".strip()

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The backend starts here; programs that tests start get the flags that were given, not these.
jax.devices()
if _given is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = _given


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the parameter tables in tests/golden instead of comparing with them",
    )


# Long files of few tests. Were they to come last, as pytest-xdist likes it, one worker would
# wait for the other's; with `--no-loadscope-reorder` files are run in the order of the collection.
LONG = ("tiny_layouts", "tiny_run", "cumo_tiny", "multihost", "sharded_start", "layouts", "launch")


def pytest_collection_modifyitems(items):
    first = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(LONG)))


@pytest.fixture
def update_golden(request) -> bool:
    """Whether recorded tables are to be rewritten."""
    return request.config.getoption("--update-golden")


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """Eight devices."""
    found = jax.devices()
    assert len(found) >= 8, f"{len(found)} devices, eight are needed"
    return found[:8]


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One embedded data set and one compilation cache for all runs of the session."""
    return tmp_path_factory.mktemp("cache")
