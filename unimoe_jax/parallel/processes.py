"""How a process finds the others: from flags, from the environment, a Kubernetes JobSet, SLURM or a
Cloud TPU pod. `distributed` joins what is found here.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Mapping
from dataclasses import dataclass

PORT = 8476
CLUSTERS = ("auto", "slurm", "tpu", "jobset", "none")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""What jax reads of a task that `srun` has started."""


class DistributedError(RuntimeError):
    """Processes that do not find each other, or do not agree."""


@dataclass(frozen=True)
class Processes:
    """How this process joins the others.

    Attributes:
        method: who says so: `flags` (or environment), `jobset`, `slurm` or `tpu`.
        coordinator: HOST:PORT of process 0; None where jax finds it (slurm, tpu).
        count, index: processes, and which this is; None where jax finds them.
    """

    method: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


def find_processes(args: argparse.Namespace, env: Mapping[str, str]) -> Processes | None:
    """How this process joins others, or None if it is alone.

    Raises:
        DistributedError: settings that are incomplete or contradict each other.
    """
    cluster = args.cluster
    if cluster not in CLUSTERS:  # argparse takes any default
        raise DistributedError(f"UNIMOE_CLUSTER={cluster!r}: allowed: {', '.join(CLUSTERS)}")
    if cluster == "none":
        return None
    explicit = _explicit(args, env)
    if explicit:
        return explicit
    if cluster == "jobset" or (cluster == "auto" and "JOBSET_NAME" in env):
        return _jobset(env)
    if cluster == "slurm" or (cluster == "auto" and _under_srun(env)):
        return _slurm(env)
    # A pod on Kubernetes names its workers; one made by gcloud does not: there, say --cluster tpu.
    if cluster == "tpu" or (cluster == "auto" and "," in env.get("TPU_WORKER_HOSTNAMES", "")):
        return Processes("tpu")
    return None


def _explicit(args: argparse.Namespace, env: Mapping[str, str]) -> Processes | None:
    given = {
        "--coordinator (JAX_COORDINATOR_ADDRESS)": args.coordinator
        or env.get("JAX_COORDINATOR_ADDRESS"),
        "--processes (JAX_NUM_PROCESSES)": _number(args.processes, "JAX_NUM_PROCESSES", env),
        "--process (JAX_PROCESS_ID)": _number(args.process, "JAX_PROCESS_ID", env),
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise DistributedError(f"several processes: {' and '.join(missing)} not given")
    coordinator, count, index = given.values()
    return _checked(Processes("flags", coordinator, count, index))


def _number(flag: int | None, name: str, env: Mapping[str, str]) -> int | None:
    if flag is not None or name not in env:
        return flag
    if not env[name].isdigit():
        raise DistributedError(f"{name}={env[name]!r}: not a number")
    return int(env[name])


def _jobset(env: Mapping[str, str]) -> Processes:
    """Pods of a JobSet with one replicated job, whose first pod is process 0."""
    wanted = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "PROCESSES", "JOB_COMPLETION_INDEX")
    missing = [name for name in wanted if not env.get(name)]
    if missing:
        raise DistributedError(f"JobSet: {', '.join(missing)} not set; see launch/k8s_jobset.yaml")
    name, job = env["JOBSET_NAME"], env["REPLICATED_JOB_NAME"]
    count, index = (_number(None, name, env) for name in wanted[2:])
    return _checked(Processes("jobset", f"{name}-{job}-0-0.{name}:{PORT}", count, index))


def _checked(found: Processes) -> Processes:
    host, _, port = found.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise DistributedError(
            f"coordinator {found.coordinator!r}: not HOST:PORT with a port from 1 to 65535"
        )
    if not 0 <= found.index < found.count:
        raise DistributedError(f"process {found.index} of {found.count}: counted from 0")
    return found


def _under_srun(env: Mapping[str, str]) -> bool:
    # A batch script without srun has the job's variables, but not those of a step.
    tasks = _number(None, "SLURM_STEP_NUM_TASKS", env)
    return "SLURM_STEP_NODELIST" in env and (tasks or 1) > 1


def _slurm(env: Mapping[str, str]) -> Processes:
    missing = [name for name in SLURM if name not in env]
    if missing:
        raise DistributedError(f"SLURM: {', '.join(missing)} not set; start with srun")
    for name in SLURM[2:]:
        _number(None, name, env)
    return Processes("slurm")


def check_port(coordinator: str) -> None:
    """Process 0 must be able to listen there; jax would crash."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise DistributedError(
                f"coordinator {coordinator!r}: process 0 cannot listen on that port "
                f"({error.strerror}); take another one, on all processes"
            ) from error
