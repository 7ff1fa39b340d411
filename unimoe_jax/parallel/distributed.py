"""Several processes as one program: how they find each other, agree on things, and end together.

One process drives the devices of one host (or one GPU). They are found from flags, from the
environment (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`), from a Kubernetes
JobSet, from SLURM (under `srun`) or from a Cloud TPU pod. With one process nothing is started.

What must be equal everywhere is agreed through jax's coordination service, which needs no device
and no shared folder. Process 0 alone writes and prints; see `is_writer`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax

from unimoe_jax.parallel.processes import CLUSTERS, DistributedError, check_port, find_processes
from unimoe_jax.runtime.cpu import settle_cpu

T = TypeVar("T")

HEARTBEAT_SECONDS = 30
"""A process that is silent for so long counts as dead, and the others stop."""
JOIN_SECONDS = 300
"""How long processes wait at the start until all are there."""
WAIT_SECONDS = 24 * 3600
"""How long processes wait for the one that prepares data; a dead one is noticed by its silence."""
LEAVE_SECONDS = 5
"""How long a process that failed waits to see whether all others failed as well."""
ALIKE_LOG = "unimoe_jax.data.index"
"""Logs what all processes find in the same files; process 0 tells it."""
OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
"""How jax begins its report of what a process cannot do, whatever the others do."""
PEER_FAULTS = ("UNKNOWN: ", "INTERNAL: ", "UNAVAILABLE: ", "ABORTED: ", "DEADLINE_EXCEEDED: ")
"""How jax begins its report of a broken connection where it raises ValueError, as 0.12 does when an
array is fetched."""
PEER_LOST = (
    "stopped: another process is gone or out of reach ({}). The same command, started again on "
    "all, continues from the last checkpoint."
)


# -------------------------------------------------------------------------------- joining


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every program that may run as several processes."""
    group = parser.add_argument_group("several processes (found by themselves under srun)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which this is, from 0")
    group.add_argument(
        "--cluster",
        choices=CLUSTERS,
        default=os.environ.get("UNIMOE_CLUSTER") or "auto",
        help="who started the processes; `tpu` on all workers of a Cloud TPU pod",
    )


def initialize(args: argparse.Namespace) -> None:
    """Join the other processes, if there are any. Comes before anything that touches a device.

    Raises:
        DistributedError: incomplete settings, or process 0 is not reached. The program ends where
            some never come.
    """
    found = find_processes(args, os.environ)
    settle_cpu(several=found is not None)
    if found is None:
        return
    options = {
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "initialization_timeout": JOIN_SECONDS + 60,
    }
    if found.coordinator is not None:
        if found.index == 0:
            check_port(found.coordinator)
        options |= {
            "coordinator_address": found.coordinator,
            "num_processes": found.count,
            "process_id": found.index,
            "cluster_detection_method": "deactivate",
        }
    elif found.method == "slurm":
        options |= {"cluster_detection_method": "slurm"}
    # It would note SIGTERM for those who ask, and nothing here does: a program could not be ended
    # before it has anything to save, and one that saves nothing never.
    jax.config.update("jax_enable_preemption_service", False)
    where = found.coordinator or f"found by {found.method}"
    # jax would abort, with a stack and without a word of what is missing.
    patience = threading.Timer(JOIN_SECONDS, _not_all_there, [where])
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        reason = _first_line(error)
        raise DistributedError(f"process 0 ({where}) is not reached: {reason}") from error
    finally:
        patience.cancel()
    if not is_writer():
        logging.getLogger(ALIKE_LOG).setLevel(logging.ERROR)


def _not_all_there(where: str) -> NoReturn:
    message = (
        f"error: not all processes have come to process 0 ({where}) within {JOIN_SECONDS} s: one "
        "has not started, has failed (see what it printed), or does not reach that address"
    )
    print(f"{socket.gethostname()}: {message}", file=sys.stderr, flush=True)
    _leave_now(2)


# ------------------------------------------------------------------------ collectives on CPUs


# ---------------------------------------------------------------------------------- agreement


def is_writer() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


_calls: dict[str, Iterator[int]] = defaultdict(itertools.count)


def _key(what: str) -> str:
    # Numbered per purpose, so that a thread may wait for its own purpose beside the main one.
    return f"unimoe/{what}/{next(_calls[what])}"


def _client():
    # jax has no public name for the coordination service's key-value store and barriers.
    from jax._src import distributed

    return distributed.global_state.client


def wait_for_all(what: str) -> None:
    """Return when every process has come here, equally often for the same `what`."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(_key(what), WAIT_SECONDS * 1000)


def all_texts(what: str, text: str) -> list[str]:
    """The `text` of every process, in their order."""
    if jax.process_count() == 1:
        return [text]
    folder = _key(what)
    # A first character, because the store takes no empty values.
    _client().key_value_set(f"{folder}/{jax.process_index()}", f"={text}")
    return [
        _client().blocking_key_value_get(f"{folder}/{index}", WAIT_SECONDS * 1000)[1:]
        for index in range(jax.process_count())
    ]


def require_same(what: str, text: str) -> None:
    """Check that all processes hold the same `text`, for example the resolved settings.

    Raises:
        DistributedError: on all of them, naming one that differs from process 0.
    """
    digests = all_texts(what, hashlib.sha256(text.encode()).hexdigest())
    other = next((i for i, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise DistributedError(
            f"{what}: process {other} differs from process 0; all processes need the same "
            "command, package versions and files"
        )


def writer_first(what: str, action: Callable[[], T]) -> T:
    """`action()` on process 0 and then on the others, which find on disk what it has prepared.

    Raises:
        what `action` raises; a failure on process 0 is a DistributedError on the others.
    """
    if jax.process_count() == 1:
        return action()
    key = _key(what)
    if not is_writer():
        failed = _client().blocking_key_value_get(key, WAIT_SECONDS * 1000)[1:]
        if failed:
            raise DistributedError(f"process 0: {failed}")
        return action()
    try:
        result = action()
    except Exception as error:
        _client().key_value_set(key, f"={error}")
        raise
    _client().key_value_set(key, "=")
    return result


def require_all(what: str, error: str) -> None:
    """Raise on all processes if any has an `error` (empty: none).

    Raises:
        DistributedError: the first error, with the process that has it.
    """
    for index, text in enumerate(all_texts(what, error)):
        if text:
            raise DistributedError(f"process {index}: {text}" if jax.process_count() > 1 else text)


# -------------------------------------------------------------------------------- the end


def lost_peer(error: Exception) -> bool:
    """Whether `error` is how jax reports that another process has gone."""
    if jax.process_count() == 1:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not str(error).startswith(OWN_FAULTS)
    return isinstance(error, ValueError) and str(error).startswith(PEER_FAULTS)


def guard(body: Callable[[], int]) -> int:
    """The exit code of `body`; processes leave together, or at once where another is lost.

    An exception of one process must end it without waiting for the others, which may wait for it.
    """
    try:
        code = body()
    except KeyboardInterrupt:
        fail("interrupted", 130)
        _leave_now(130)  # an orderly exit would wait for threads that compile
    except Exception as error:
        if not _joined():
            raise
        if lost_peer(error):
            return fail(PEER_LOST.format(_first_line(error)), 1)
        traceback.print_exc()
        _leave_now(1)
    if _joined():
        jax.distributed.shutdown()
    return code


def fail(message: str, code: int) -> int:
    """Print `message` once and end with `code`: returned, or at once where others may wait.

    If all processes fail, process 0 speaks for them, and they end with its code: what stops it is
    to the others that it has stopped. If only some do, each of them speaks, and the others learn of
    it as their connections break.
    """
    if not _joined():
        print(message, file=sys.stderr, flush=True)
        return code
    together = _all_leave(code)
    code = code if together is None else together
    if is_writer() or together is None:
        alone = _name() if together is None else ""
        print(f"{alone}{message}", file=sys.stderr, flush=True)
    if is_writer():  # the others' connections end with this process
        time.sleep(1)
    return _leave_now(code)


def _name() -> str:
    return f"process {jax.process_index()} ({socket.gethostname()}): "


def _joined() -> bool:
    return _client() is not None


def _all_leave(code: int) -> int | None:
    """Process 0's code, where all processes come here; else None."""
    try:
        if is_writer():
            _client().key_value_set("unimoe/code", str(code))
        _client().wait_at_barrier("unimoe/leave", LEAVE_SECONDS * 1000)
        return int(_client().blocking_key_value_get("unimoe/code", LEAVE_SECONDS * 1000))
    except jax.errors.JaxRuntimeError:
        return None


def _leave_now(code: int) -> NoReturn:
    # An orderly exit would wait for processes that are gone, or that wait for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0]
