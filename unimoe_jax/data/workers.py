"""What a process that reads data for a program does about signals, and about the program's end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

WATCH_SECONDS = 1.0
_KILLED = re.compile(r"terminated unexpectedly with exit code -(\d+)")


def stay_with_parent(index: int, count: int) -> None:
    """For `worker_init_fn` of grain: the program alone decides when its workers end.

    Ctrl-C in a terminal, and SLURM's signals, reach all processes at once. The program then takes
    another step and saves; it needs batches for that. A program that was killed ends nothing.
    """
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


@contextlib.contextmanager
def explaining_killed_workers() -> Iterator[None]:
    """What grain raises where a worker was killed is one line; faults of a worker's own stay as
    they are.

    Raises:
        ChildProcessError: a worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        found = _KILLED.search(str(error))
        if found is None:
            raise
        raise ChildProcessError(
            f"a process that reads data (loader.workers) was killed by {_name(int(found[1]))}, "
            "for want of memory perhaps: set fewer workers, or a smaller loader.prefetch"
        ) from error


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of real-time signals only the first and the last have one
        return f"signal {number}"
