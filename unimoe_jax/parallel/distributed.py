"""Several processes as one program: they join, agree on values, and end together.

One process drives the devices of one host (or one GPU). `processes` finds the others; with only one
process nothing is started. Values that must be the same everywhere are compared through jax's
coordination service, which needs no device and no shared folder. Only process 0 writes and prints,
see `is_writer`.
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
from typing import Any, NoReturn, TypeVar

import jax

from unimoe_jax.parallel.processes import (
    CLUSTERS,
    DistributedError,
    Processes,
    check_port,
    find_processes,
)
from unimoe_jax.runtime.cpu import settle_cpu

T = TypeVar("T")

HEARTBEAT_SECONDS = 30
"""A process that is silent for this long counts as dead, and the others stop."""
JOIN_SECONDS = 300
"""How long processes wait at the start for all others to join."""
WAIT_SECONDS = 24 * 3600
"""How long processes wait for the one that prepares data; its heartbeat shows if it has died."""
LEAVE_SECONDS = 5
"""How long a process that failed waits to see whether all others failed as well."""
SHARED_LOG = "unimoe_jax.data.index"
"""The logger of events that every process finds in the same files, so only process 0 logs them."""
LOCAL_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
"""Beginnings of jax's reports of faults that the other processes have no part in."""
PEER_FAULTS = ("UNKNOWN: ", "INTERNAL: ", "UNAVAILABLE: ", "ABORTED: ", "DEADLINE_EXCEEDED: ")
"""Beginnings of jax's reports of a broken connection if it raises a ValueError, as jax 0.12 does
when an array is fetched."""
PEER_LOST = (
    "stopped: another process is gone or out of reach ({}). Start the same command again on all "
    "hosts to continue from the last checkpoint."
)


# -------------------------------------------------------------------------------- joining


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a program that may run as several processes."""
    group = parser.add_argument_group("several processes (under srun they need no flags)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="the number of processes")
    group.add_argument(
        "--process", type=int, metavar="I", help="the number of this process, from 0"
    )
    group.add_argument(
        "--cluster",
        choices=CLUSTERS,
        default=os.environ.get("UNIMOE_CLUSTER") or "auto",
        help="the system that started the processes; `tpu` on all workers of a Cloud TPU pod",
    )


def initialize(args: argparse.Namespace) -> None:
    """Join the other processes, if there are any. Must come before anything that uses a device.

    If some processes do not join within `JOIN_SECONDS`, the program prints a message and ends.

    Raises:
        DistributedError: settings are incomplete, or process 0 cannot be reached.
    """
    processes = find_processes(args, os.environ)
    settle_cpu(several=processes is not None)
    if processes is None:
        return
    options = _jax_options(processes)
    # jax's preemption service catches SIGTERM and waits for somebody to ask about it. We handle
    # SIGTERM ourselves (train.stop); with the service on, a process that never asks could not be
    # terminated.
    jax.config.update("jax_enable_preemption_service", False)
    where = processes.coordinator or f"found by {processes.method}"
    # If processes are missing, jax would abort with a stack trace that does not say so. This timer
    # ends the process with a message before that.
    timer = threading.Timer(JOIN_SECONDS, _exit_incomplete, [where])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        reason = _first_line(error)
        raise DistributedError(f"process 0 ({where}) cannot be reached: {reason}") from error
    finally:
        timer.cancel()
    if not is_writer():
        logging.getLogger(SHARED_LOG).setLevel(logging.ERROR)


def _jax_options(processes: Processes) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize`.

    Raises:
        DistributedError: this is process 0, and it cannot listen on the coordinator's port.
    """
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        # Longer than the timer in `initialize`, which prints a better message than jax.
        "initialization_timeout": JOIN_SECONDS + 60,
    }
    if processes.coordinator is not None:
        if processes.index == 0:
            check_port(processes.coordinator)
        options |= {
            "coordinator_address": processes.coordinator,
            "num_processes": processes.count,
            "process_id": processes.index,
            "cluster_detection_method": "deactivate",
        }
    elif processes.method == "slurm":
        options |= {"cluster_detection_method": "slurm"}
    return options


def _exit_incomplete(where: str) -> NoReturn:
    """Print that processes are missing, and end this process with exit code 2."""
    message = (
        f"error: not all processes have joined process 0 ({where}) within {JOIN_SECONDS} s: one of "
        "them has not started, has failed (see its output), or cannot reach that address"
    )
    print(f"{socket.gethostname()}: {message}", file=sys.stderr, flush=True)
    _exit_now(2)


# ---------------------------------------------------------------------------------- agreement


def is_writer() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


_calls: dict[str, Iterator[int]] = defaultdict(itertools.count)


def _key(what: str) -> str:
    """A key of the coordination service that is used once, for example unimoe/settings/0."""
    # Count calls per `what`, so that two threads can wait for different purposes at the same time.
    return f"unimoe/{what}/{next(_calls[what])}"


def _client() -> Any:
    """The client of the coordination service: a key-value store and barriers; None if alone."""
    # jax has no public name for it.
    from jax._src import distributed

    return distributed.global_state.client


def wait_for_all(what: str) -> None:
    """Return when every process has called this equally often for the same `what`."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(_key(what), WAIT_SECONDS * 1000)


def all_texts(what: str, text: str) -> list[str]:
    """The `text` of every process, in the order of the processes."""
    if jax.process_count() == 1:
        return [text]
    folder = _key(what)
    # "=" comes first because the store takes no empty values; it is removed again below.
    _client().key_value_set(f"{folder}/{jax.process_index()}", f"={text}")
    return [
        _client().blocking_key_value_get(f"{folder}/{index}", WAIT_SECONDS * 1000)[1:]
        for index in range(jax.process_count())
    ]


def require_same(what: str, text: str) -> None:
    """Check that all processes hold the same `text`, for example the resolved settings.

    Raises:
        DistributedError: on all processes, naming one that differs from process 0.
    """
    digests = all_texts(what, hashlib.sha256(text.encode()).hexdigest())
    different = next((i for i, digest in enumerate(digests) if digest != digests[0]), None)
    if different is not None:
        raise DistributedError(
            f"{what}: process {different} differs from process 0; all processes need the same "
            "command, package versions and files"
        )


def writer_first(what: str, action: Callable[[], T]) -> T:
    """Run `action` on process 0 first and then on the others, which find its files on disk.

    Returns the result of this process's `action`.

    Raises:
        DistributedError: on the other processes, if `action` fails on process 0.
        Exception: anything that this process's `action` raises.
    """
    if jax.process_count() == 1:
        return action()
    key = _key(what)
    # The others wait for the message of process 0, which is empty if its action succeeded.
    if not is_writer():
        failure = _client().blocking_key_value_get(key, WAIT_SECONDS * 1000)[1:]
        if failure:
            raise DistributedError(f"process 0: {failure}")
        return action()
    try:
        result = action()
    except Exception as error:
        _client().key_value_set(key, f"={error}")
        raise
    _client().key_value_set(key, "=")
    return result


# -------------------------------------------------------------------------------- the end


def lost_peer(error: Exception) -> bool:
    """Whether jax reports by `error` that another process has gone."""
    if jax.process_count() == 1:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not str(error).startswith(LOCAL_FAULTS)
    return isinstance(error, ValueError) and str(error).startswith(PEER_FAULTS)


def guard(body: Callable[[], int]) -> int:
    """Run `body` and return its exit code, after all processes have finished theirs.

    After an exception, this process ends at once. It must not wait for the others, because they may
    be waiting for it.
    """
    try:
        code = body()
    except KeyboardInterrupt:
        fail("interrupted", 130)
        _exit_now(130)  # an orderly exit would wait for threads that compile
    except Exception as error:
        if not _joined():
            raise
        if lost_peer(error):
            return fail(PEER_LOST.format(_first_line(error)), 1)
        traceback.print_exc()
        _exit_now(1)
    if _joined():
        jax.distributed.shutdown()
    return code


def fail(message: str, code: int) -> int:
    """Print `message` and end with exit code `code`.

    A single process returns the code to its caller; one of several processes ends at once, because
    the others may be waiting for it.

    If all processes fail, only process 0 prints, and all exit with its code, because the others
    mostly fail as a consequence of process 0 failing. If only some fail, each of them prints, and
    the others stop when their connections break.
    """
    if not _joined():
        print(message, file=sys.stderr, flush=True)
        return code
    shared_code = _shared_exit_code(code)
    if shared_code is None:
        # Only some processes have failed, so the message says which one.
        print(f"{_name()}{message}", file=sys.stderr, flush=True)
    else:
        code = shared_code
        if is_writer():
            print(message, file=sys.stderr, flush=True)
    # The coordination service ends with process 0, so process 0 leaves last.
    if is_writer():
        time.sleep(1)
    return _exit_now(code)


def _name() -> str:
    """The beginning of a message that only this process prints."""
    return f"process {jax.process_index()} ({socket.gethostname()}): "


def _joined() -> bool:
    """Whether this process has joined others."""
    return _client() is not None


def _shared_exit_code(code: int) -> int | None:
    """Process 0's code, if all processes fail within `LEAVE_SECONDS`; else None."""
    try:
        if is_writer():
            _client().key_value_set("unimoe/code", str(code))
        _client().wait_at_barrier("unimoe/leave", LEAVE_SECONDS * 1000)
        return int(_client().blocking_key_value_get("unimoe/code", LEAVE_SECONDS * 1000))
    except jax.errors.JaxRuntimeError:
        return None


def _exit_now(code: int) -> NoReturn:
    """End this process without any cleaning up."""
    # An orderly exit would wait for processes that are gone, or that are waiting for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_line(error: object) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0]
