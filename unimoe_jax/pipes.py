"""Programs whose output is read through a pipe, as in `… | head`."""

from __future__ import annotations

import os
import sys

READER_GONE = 141
"""The exit code with which a shell reports SIGPIPE."""


def reader_gone() -> int:
    """What a program returns, in silence, when standard output raised BrokenPipeError."""
    # What is still to be written would be complained of when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return READER_GONE
