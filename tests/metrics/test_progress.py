"""The progress line: live on a terminal, else printed now and then."""

import io

import pytest
from rich.console import Console

from unimoe_jax.metrics import progress
from unimoe_jax.metrics.progress import Progress, format_progress, format_seconds


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test sets `clock[0]`, in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def console(**settings) -> tuple[Console, io.StringIO]:
    """A console, and the text that is printed to it."""
    text = io.StringIO()
    return Console(file=text, width=160, highlight=False, **settings), text


def test_plain_lines_come_first_last_and_every_few_seconds(clock):
    out, printed = console()
    with Progress("tune", 100, every_seconds=10, console=out) as shown:
        shown.announce("compiling the train step, usually 20-90 s …")
        clock[0] += 30
        for step in range(1, 101):
            values = {"loss": 2.0, "lr": 1e-4, "tokens_per_s": 12345.6, "data_wait_share": 0.25}
            shown.update(step, values | {"balance": 0.01, "grad_norm": 3.0})
            clock[0] += 1
    lines = printed.getvalue().splitlines()
    assert lines[0] == "tune: compiling the train step, usually 20-90 s …"
    assert lines[1].endswith("done in 30.0 s")
    assert [line.split()[1] for line in lines[2:4]] == ["1/100", "11/100"]
    assert len(lines) == 2 + 11 and lines[-1].startswith("tune 100/100")
    assert lines[3] == (
        "tune  11/100  loss 2.0000  balance 0.01  lr 1.00e-04  12,346 tok/s  data wait 25%  "
        "left 1 m 29 s"
    )


def test_plain_lines_every_n_steps(clock):
    out, printed = console()
    shown = Progress("tune", 9, every_seconds=1e9, every_steps=4, console=out)
    for step in range(1, 10):
        shown.update(step, {"loss": float("nan")})
    lines = printed.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/9", "5/9", "9/9"]
    assert "loss nan" in lines[0]


def test_a_terminal_gets_one_live_line():
    out, printed = console(force_terminal=True)
    with Progress("tune", 3, console=out) as shown:
        shown.announce("compiling …")
        for step in range(1, 4):
            shown.update(step, {"loss": 1.0})
    text = printed.getvalue()
    assert "tune 3/3" in text and "compiling … done in" in text
    assert text.count("tune 3/3") <= 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.21, "4.2 s"),
        (59.97, "1 m 00 s"),
        (200, "3 m 20 s"),
        (3599.8, "1 h 00 m"),
        (7500, "2 h 05 m"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_other_processes_print_nothing(capsys):
    with Progress("align", 5, enabled=False) as shown:
        shown.announce("compiling")
        shown.update(1, {"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_the_progress_line_names_the_module_of_router_losses():
    values = {"loss": 1.0, "encoder_balance": 1.25, "encoder_router_z": 0.5, "balance": 1.5}
    line = format_progress("sft", 3, 10, values, None)
    assert line == "sft  3/10  loss 1.0000  encoder balance 1.25  z 0.5  balance 1.5"


def test_the_progress_line_has_dropped_slots_as_a_share():
    """Lines cover different numbers of steps, so a number of slots would not be comparable."""
    load = [[[30, 10], [0, 0]], [[20, 20], [0, 0]]]
    values = {"encoder_dropped": 20.0, "encoder_expert_load": load}
    assert format_progress("sft", 3, 10, values, None) == "sft  3/10  dropped 25.0%"
