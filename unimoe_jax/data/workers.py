"""Worker processes: how they react to signals and to the end of their program."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

WATCH_SECONDS = 1.0
"""How often a worker looks whether its program is still running."""
_KILLED = re.compile(r"terminated unexpectedly with exit code -(\d+)")


def stay_with_parent(index: int, count: int) -> None:
    """Make a worker end when its program ends, and not before (`worker_init_fn` of grain).

    Ctrl-C in a terminal and SLURM's signals reach the program and its workers at once. The program
    then takes another step and saves, and it needs batches for that, so its workers ignore these
    signals. A program that was killed cannot end its workers, so they watch for its end.
    """
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    # A process whose parent has ended gets another parent.
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


@contextlib.contextmanager
def explaining_killed_workers() -> Iterator[None]:
    """Turn grain's error about a killed worker into one line; other errors pass unchanged.

    Raises:
        ChildProcessError: a worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        killed = _KILLED.search(str(error))
        if killed is None:
            raise
        raise ChildProcessError(
            f"a process that reads data (loader.workers) was killed by "
            f"{_signal_name(int(killed[1]))}, perhaps because memory ran out: set fewer workers, "
            "or a smaller loader.prefetch"
        ) from error


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # only the first and the last real-time signal have a name
        return f"signal {number}"
