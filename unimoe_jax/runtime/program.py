"""The name by which the user has called the running program."""

from __future__ import annotations

import sys
from pathlib import Path

CONSOLE_COMMAND = "unimoe"


def program_name(verb: str) -> str:
    """`unimoe VERB` if the console command was called, else `python -m unimoe_jax.VERB`.

    The first argument of a process is the path of the program: `…/bin/unimoe` for the console
    command (`unimoe.exe` on Windows), and `…/unimoe_jax/VERB/__main__.py` for `python -m`.
    """
    if Path(sys.argv[0]).stem == CONSOLE_COMMAND:
        return f"{CONSOLE_COMMAND} {verb}"
    return f"python -m unimoe_jax.{verb}"
