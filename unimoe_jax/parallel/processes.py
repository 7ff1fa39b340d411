"""Find the other processes of a program, from the first of these sources that names them:

    flags, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    a Kubernetes JobSet
    SLURM, under `srun`
    a Cloud TPU pod

`distributed` joins the processes that are found here.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Mapping
from dataclasses import dataclass

PORT = 8476
"""The port of process 0 in a JobSet."""
CLUSTERS = ("auto", "slurm", "tpu", "jobset", "none")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""Variables of a task under `srun` that jax reads."""


class DistributedError(RuntimeError):
    """Raised if processes do not find each other, or do not agree."""


@dataclass(frozen=True)
class Processes:
    """How this process joins the others.

    Attributes:
        method: the source: `flags` (or environment), `jobset`, `slurm` or `tpu`.
        coordinator: HOST:PORT of process 0; None if jax finds it (slurm, tpu).
        count: the number of processes; None if jax finds it.
        index: the number of this process, from 0; None if jax finds it.
    """

    method: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


def find_processes(args: argparse.Namespace, env: Mapping[str, str]) -> Processes | None:
    """How this process joins the others, or None if it is the only one.

    Args:
        args: the flags of `distributed.add_arguments`.
        env: environment variables.

    Raises:
        DistributedError: settings are incomplete or contradict each other.
    """
    cluster = args.cluster
    # The default of --cluster is the variable, and argparse does not check defaults.
    if cluster not in CLUSTERS:
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
    # A TPU pod on Kubernetes lists its workers in this variable. A pod made by gcloud does not, so
    # it needs --cluster tpu.
    if cluster == "tpu" or (cluster == "auto" and "," in env.get("TPU_WORKER_HOSTNAMES", "")):
        return Processes("tpu")
    return None


def _explicit(args: argparse.Namespace, env: Mapping[str, str]) -> Processes | None:
    """Processes named by flags or by jax's variables; None if none of the three values is set.

    Raises:
        DistributedError: only some of the three values are set, or a value is wrong.
    """
    coordinator = args.coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    count = _number(args.processes, "JAX_NUM_PROCESSES", env)
    index = _number(args.process, "JAX_PROCESS_ID", env)
    values = {
        "--coordinator (JAX_COORDINATOR_ADDRESS)": coordinator,
        "--processes (JAX_NUM_PROCESSES)": count,
        "--process (JAX_PROCESS_ID)": index,
    }
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return None
    if coordinator is None or count is None or index is None:
        raise DistributedError(
            f"several processes need all of {', '.join(values)}; {' and '.join(missing)} not given"
        )
    return _checked("flags", coordinator, count, index)


def _number(flag: int | None, name: str, env: Mapping[str, str]) -> int | None:
    """The value of a flag, else of the variable `name`; None if neither is set.

    Raises:
        DistributedError: the variable is not a number.
    """
    if flag is not None or name not in env:
        return flag
    if not env[name].isdigit():
        raise DistributedError(f"{name}={env[name]!r}: not a number; set it to 0, 1, 2, …")
    return int(env[name])


def _jobset(env: Mapping[str, str]) -> Processes:
    """Processes that are the pods of a JobSet with one replicated job; its first pod is process 0.

    Raises:
        DistributedError: a variable that launch/k8s_jobset.yaml sets is missing or wrong.
    """
    wanted = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "PROCESSES", "JOB_COMPLETION_INDEX")
    missing = [name for name in wanted if not env.get(name)]
    if missing:
        raise DistributedError(f"JobSet: {', '.join(missing)} not set; see launch/k8s_jobset.yaml")
    name, job = env["JOBSET_NAME"], env["REPLICATED_JOB_NAME"]
    count = _number(None, "PROCESSES", env)
    index = _number(None, "JOB_COMPLETION_INDEX", env)
    assert count is not None and index is not None
    # Kubernetes resolves this name to pod 0 of replica 0 of the job.
    return _checked("jobset", f"{name}-{job}-0-0.{name}:{PORT}", count, index)


def _checked(method: str, coordinator: str, count: int, index: int) -> Processes:
    """These processes.

    Raises:
        DistributedError: the coordinator is not HOST:PORT, or there is no such process.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise DistributedError(
            f"coordinator {coordinator!r}: not HOST:PORT with a port from 1 to 65535"
        )
    if not 0 <= index < count:
        raise DistributedError(
            f"process {index} of {count}: processes are counted from 0 to {count - 1}"
        )
    return Processes(method, coordinator, count, index)


def _under_srun(env: Mapping[str, str]) -> bool:
    """Whether `srun` has started this process as one of several tasks."""
    # A batch script without srun has the job's variables, but not the variables of a step.
    tasks = _number(None, "SLURM_STEP_NUM_TASKS", env)
    return "SLURM_STEP_NODELIST" in env and (tasks or 1) > 1


def _slurm(env: Mapping[str, str]) -> Processes:
    """Processes that are the tasks of `srun`; jax reads the details from its variables.

    Raises:
        DistributedError: a variable that jax reads is missing or not a number.
    """
    missing = [name for name in SLURM if name not in env]
    if missing:
        raise DistributedError(f"SLURM: {', '.join(missing)} not set; start with srun")
    # The number of tasks, and the number of this task in the job and on its host.
    for name in SLURM[2:]:
        _number(None, name, env)
    return Processes("slurm")


def check_port(coordinator: str) -> None:
    """Check that process 0 can listen on the coordinator's port; jax would crash if it cannot.

    Raises:
        DistributedError: the port is in use or not allowed.
    """
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        # A port that another program has just released counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise DistributedError(
                f"coordinator {coordinator!r}: process 0 cannot listen on that port "
                f"({error.strerror}); give another port to all processes"
            ) from error
