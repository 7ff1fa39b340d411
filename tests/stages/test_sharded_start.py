"""A stage starts from an earlier one on several processes; each reads only what it holds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.sources import array_source
from tests.stages.start_worker import COPIED
from unimoe_jax.checkpoints.manifest import read_manifest
from unimoe_jax.checkpoints.origins import start_of
from unimoe_jax.config import MeshConfig, Take
from unimoe_jax.parallel.sharding import make_mesh
from unimoe_jax.stages.initial_params import read_start

ROOT = Path(__file__).parents[2]
PROCESSES = 2


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict[str, dict[str, int]]]:
    """The reports of processes with two devices each, which save and read one result together."""
    folder = tmp_path_factory.mktemp("start") / "final"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "tests.stages.start_worker",
        str(folder),
        "--coordinator",
        address,
    ]
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [*command, "--processes", str(PROCESSES), "--process", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            text=True,
        )
        for index in range(PROCESSES)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, printed
    assert read_manifest(folder)["moe_layers"] == [True, True]
    return [json.loads(text.splitlines()[-1]) for text in printed]


def test_a_process_reads_only_what_its_devices_hold(reports):
    """The processes compare values themselves. Random numbers compress by less than a tenth."""
    for report in reports:
        for path, sizes in report.items():
            assert sizes["held"] == sizes["whole"] / PROCESSES, path
            # A device holds two copies of its half of the dense layer, and reads it once.
            needed = sizes["held"] / (2 if path == COPIED else 1)
            assert 0.85 * needed < sizes["read"] < 1.05 * needed, path


def test_a_part_on_several_devices_is_read_once(devices):
    """The kernel has four parts, each on two devices; no read is larger than a part."""
    value = np.arange(48, dtype=np.float32).reshape(2, 8, 3)
    path, loaded = "decoder/run_0/block_0/attention/q_proj/kernel", []
    source = array_source("before", {path: value}, (False, False))

    def load(path: str, index) -> np.ndarray:
        loaded.append(index)
        return source.load(path, index)

    watched = {"before": replace(source, load=load)}
    take = Take(match=".*", source="before")
    start = start_of(path, value.shape, take, watched, source.moe_layers)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), devices)
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    array = read_start(start, "bfloat16", sharding)
    assert array.sharding == sharding and array.dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(np.asarray(array), value.astype(array.dtype))
    expected = [
        (layer, slice(2 * part, 2 * part + 2), slice(0, 3)) for part in range(4) for layer in (0, 1)
    ]
    assert sorted(loaded, key=str) == sorted(expected, key=str)
