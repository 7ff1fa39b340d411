"""Programs that print end quietly when their reader goes, as in `… | head`."""

from __future__ import annotations

import os

import pytest

from unimoe_jax.convert import __main__ as convert
from unimoe_jax.experts import __main__ as experts
from unimoe_jax.generate import __main__ as generate
from unimoe_jax.train import __main__ as train

PROGRAMS = {
    "generate": (generate, ["--model", "m", "--prompt", "x"]),
    "convert": (convert, ["inspect", "m"]),
    "experts": (experts, ["list", "m"]),
    "print-config": (train, ["--config", "configs/run/tiny.yaml", "--print-config"]),
    "dry-run": (train, ["--config", "configs/run/tiny.yaml", "--dry-run"]),
}


@pytest.mark.parametrize("flush", [True, False], ids=["at once", "at the end"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_closed_pipe_ends_a_program_quietly(name, flush, monkeypatch, capfd):
    """The program may write the line at once or when it ends."""
    program, arguments = PROGRAMS[name]

    def print_line(*_) -> int:
        print("fox", flush=flush)
        return 0

    monkeypatch.setattr(generate, "run_command", print_line)
    monkeypatch.setitem(convert.COMMANDS, "inspect", print_line)
    monkeypatch.setattr(experts, "listing", lambda *_: print_line() or ["fox"])
    monkeypatch.setattr(train, "print_config", print_line)
    monkeypatch.setattr(train, "dry_run", print_line)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert program.main(arguments) == 141
    assert not capfd.readouterr().err
