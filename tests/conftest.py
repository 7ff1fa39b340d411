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


# The slow lane (`pytest -m slow`): whole programs that run for minutes or in several processes.
SLOW = (
    "runs/test_tiny_layouts.py",
    "runs/test_tiny_run.py",
    "runs/test_cumo_tiny.py",
    "parallel/test_multihost.py",
    "stages/test_sharded_start.py",
    "test_launch.py",
)
# Files that take more than about half a minute of a core, most of it in compilation. Everything
# that is neither here nor slow is the fast lane (`pytest -m fast`).
COMPILING = (
    "runs/test_layouts.py",
    "parity/test_golden.py",
    "parity/test_golden_generate.py",
    "stages/test_train_step.py",
    "stages/test_upcycle_check.py",
    "stages/test_modality_losses.py",
    "config/test_run_files.py",
    "params/test_param_tables.py",
    "compile/",
    "generate/test_generate.py",
    "generate/test_program.py",
    "generate/test_question_files.py",
    "parity/test_language.py",
    "parity/test_cumo_vectors.py",
    "parity/test_encoders_torch.py",
    "experts/",
    "models/test_vision_experts.py",
    "models/test_decoder.py",
    "nn/moe/test_dispatch.py",
    "nn/moe/test_dispatch_sharded.py",
    "nn/attention/test_packed.py",
    "convert/test_source_names.py",
    "convert/test_unimoe_folders.py",
    "test_types.py",
    "docs/",
    "cli/",
    "doctor/",
    "packaging/",
)
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Put every test into its lane, and the long files first.

    pytest-xdist would run long files last, and the other workers would wait for the worker that
    runs the last one. With `--no-loadscope-reorder` files run in the order of collection.
    """
    order = {name: number for number, name in enumerate((*SLOW, *COMPILING))}
    for item in items:
        name = item.path.relative_to(TESTS).as_posix()
        if name.startswith(SLOW):
            item.add_marker("slow")
        elif not name.startswith(COMPILING) and item.get_closest_marker("slow") is None:
            item.add_marker("fast")

    def position(item) -> int:
        name = item.path.relative_to(TESTS).as_posix()
        return next((n for prefix, n in order.items() if name.startswith(prefix)), len(order))

    items.sort(key=position)


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
