"""Finding the other processes: flags, environment, JobSet, SLURM and TPU pods."""

from __future__ import annotations

import argparse
import socket

import pytest

from unimoe_jax.parallel import distributed
from unimoe_jax.parallel.processes import DistributedError, Processes, find_processes


def flags(**values) -> argparse.Namespace:
    """Parsed flags with these values; the others are not given."""
    defaults = {"coordinator": None, "processes": None, "process": None, "cluster": "auto"}
    return argparse.Namespace(**{**defaults, **values})


JOBSET = {
    "JOBSET_NAME": "run",
    "REPLICATED_JOB_NAME": "workers",
    "PROCESSES": "4",
    "JOB_COMPLETION_INDEX": "3",
}


SRUN = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "7"}
SRUN |= {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("values", "env", "expected"),
    [
        ({}, {}, None),
        (
            {"coordinator": "a:1", "processes": 2, "process": 0},
            {},
            Processes("flags", "a:1", 2, 0),
        ),
        (
            {"process": 1},
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            Processes("flags", "b:2", 2, 1),
        ),
        ({}, JOBSET, Processes("jobset", "run-workers-0-0.run:8476", 4, 3)),
        ({}, SRUN, Processes("slurm")),
        ({"cluster": "slurm"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, Processes("slurm")),
        ({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # a batch script without srun
        ({}, {"TPU_WORKER_HOSTNAMES": "h0,h1"}, Processes("tpu")),
        ({}, {"TPU_WORKER_HOSTNAMES": "h0"}, None),
        ({"cluster": "tpu"}, {}, Processes("tpu")),
        ({"cluster": "none"}, JOBSET, None),
    ],
)
def test_processes_are_found(values, env, expected):
    assert find_processes(flags(**values), env) == expected


@pytest.mark.parametrize(
    ("values", "env", "message"),
    [
        ({"processes": 2}, {}, r"--coordinator .*--process .*not given"),
        ({"coordinator": "a", "processes": 2, "process": 0}, {}, "not HOST:PORT"),
        ({"coordinator": ":1", "processes": 2, "process": 0}, {}, "not HOST:PORT"),
        ({"coordinator": "a:65536", "processes": 2, "process": 0}, {}, "port from 1 to 65535"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, {}, "process 2 of 2"),
        ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'"),
        ({}, {"JOBSET_NAME": "run"}, "REPLICATED_JOB_NAME, PROCESSES"),
        ({"cluster": "SLURM"}, {}, "UNIMOE_CLUSTER='SLURM': allowed: auto, slurm"),
        ({"cluster": "slurm"}, {"SLURM_JOB_ID": "7"}, "SLURM_STEP_NODELIST, .* start with srun"),
        ({}, {**SRUN, "SLURM_STEP_NUM_TASKS": "8(x2)"}, r"SLURM_STEP_NUM_TASKS='8\(x2\)'"),
        ({}, {**SRUN, "SLURM_PROCID": ""}, "SLURM_PROCID=''"),
    ],
)
def test_incomplete_settings_are_named(values, env, message):
    with pytest.raises(DistributedError, match=message):
        find_processes(flags(**values), env)


def test_a_port_in_use_is_an_error(monkeypatch):
    """jax would crash without naming the reason."""
    monkeypatch.setattr(distributed, "settle_cpu", lambda several: None)
    with socket.create_server(("", 0)) as other_program:
        address = f"localhost:{other_program.getsockname()[1]}"
        args = flags(coordinator=address, processes=2, process=0)
        with pytest.raises(DistributedError, match=rf"{address}'.* cannot listen .*in use"):
            distributed.initialize(args)
