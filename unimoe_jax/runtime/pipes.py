"""Programs whose output is read through a pipe, as in `… | head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

READER_GONE = 141
"""The exit code with which a shell reports SIGPIPE."""


def exit_quietly_on_closed_pipe(body: Callable[[], int]) -> int:
    """The exit code of `body`, or `READER_GONE` if the reader of standard output has gone.

    A closed pipe prints no error. Every other exception of `body` is passed on.
    """
    try:
        code = body()
        # Flush here, so that a closed pipe raises here and not when the interpreter ends.
        sys.stdout.flush()
    except BrokenPipeError:
        # Redirect stdout to /dev/null; otherwise Python prints a BrokenPipeError when it flushes
        # the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    return code
