"""What a process that reads data for a program does about signals, and about the program's end."""

from __future__ import annotations

import os
import signal
import threading
import time

WATCH_SECONDS = 1.0


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
