"""Worker processes: the same batches, signals, and the end of the program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import product
from multiprocessing import active_children
from pathlib import Path

import pytest

from tests.data.helpers import LOADER, assert_same


def test_worker_processes_give_the_same_batches(build, mixed):
    """A terminal or a scheduler sends signals to all processes of a run. The workers must continue,
    because the last step before the run stops may need a batch."""
    steps = 6
    whole = list(build(mixed).batches(stop_step=steps))
    for workers in (1, 2):
        pipeline = build(mixed, LOADER.model_copy(update={"workers": workers, "prefetch": 1}))
        pairs = zip(whole, pipeline.batches(stop_step=steps), strict=True)
        for count, ((_, _, one), (_, _, two)) in enumerate(pairs, 1):
            assert_same(one, two)
            # Workers produce batches in turn. After `workers` batches each of them has started and
            # has set its signal handlers.
            started = active_children() if count >= workers else []
            for worker, number in product(started, (signal.SIGINT, signal.SIGTERM)):
                os.kill(worker.pid, number)


def test_a_worker_that_was_killed_is_named(build, mixed):
    pipeline = build(mixed, LOADER.model_copy(update={"workers": 1, "prefetch": 1}))
    batches = pipeline.batches(stop_step=99)
    next(batches)
    for worker in active_children():
        worker.kill()
    with pytest.raises(ChildProcessError, match=r"\(loader.workers\) was killed by SIGKILL"):
        list(batches)


def test_workers_end_with_a_program_that_was_killed():
    worker = "import os, time; from unimoe_jax.data.workers import stay_with_parent; "
    worker += "stay_with_parent(0, 1); print(os.getpid(), flush=True); time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        number = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(number):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(number: int) -> bool:
    try:
        return bool(Path(f"/proc/{number}/cmdline").read_bytes())  # it is empty for a zombie
    except OSError:
        return False
