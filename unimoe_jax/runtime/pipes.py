"""Programs whose output is read through a pipe, as in `… | head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

READER_GONE = 141
"""The exit code with which a shell reports SIGPIPE."""


def exit_quietly_on_closed_pipe(body: Callable[[], int]) -> int:
    """The exit code of `body`; `READER_GONE`, in silence, if nobody reads standard output any more.
    What else `body` raises goes on."""
    try:
        code = body()
        sys.stdout.flush()  # what nobody reads shows here, not when the interpreter ends
    except BrokenPipeError:
        # What is still to be written would be complained of when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    return code
