"""The result block: its words, its layout in a pipe and in a terminal."""

import copy
import json
import re

import pytest

from tests.report.made_up_run import ROUTERS, SUMMARY
from unimoe_jax.report.console import print_result_block, result_block

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def test_result_block():
    text = result_block(json.loads(json.dumps(SUMMARY)), "runs/tiny")
    lines = text.splitlines()
    assert "tiny <run>: finished in 48.2 s" in lines[1]
    assert re.fullmatch(r"align +60 +4.0000 → 1.5000 +10,000 +10.0 s", lines[3])
    assert re.fullmatch(r"tune +60 +3.9000 → nan +9,000 +3 m 20 s", lines[4])
    assert "colour                 12.5 % → 94.0 %   12.5 %" in lines
    assert "run directory  runs/tiny" in lines
    assert "next           python -m unimoe_jax.generate --run runs/tiny" in lines
    assert max(map(len, lines)) <= 80


def test_result_block_as_a_whole():
    """The layout that the README shows: names on the left, numbers on the right."""
    summary = {
        "name": "tiny",
        "seconds": 234.0,
        "stages": {"tune": {"steps": 240, "seconds": 72.0, "first_loss": 1.1986}},
        "heldout": {"image": {"before": 0.677, "after": 0.927, "chance": 0.217}},
        "routers": ROUTERS,
        "run_dir": "runs/tiny",
        "next_command": "python -m unimoe_jax.evaluate runs/tiny",
    }
    assert result_block(summary) == (
        "\n"
        "── tiny: finished in 3 m 54 s ────────────────────────────────────────────────\n"
        "stage   steps         loss   tokens/s       time\n"
        "tune      240   1.1986 → –          –   1 m 12 s\n"
        "\n"
        "held-out exact match    before → after   chance\n"
        "image                  67.7 % → 92.7 %   21.7 %\n"
        "\n"
        "routers           balance    z-loss   least used\n"
        "s encoder   1.800 → 1.080   2 → nan       45.0 %   the z-loss does not fall\n"
        "\n"
        "run directory  runs/tiny\n"
        "next           python -m unimoe_jax.evaluate runs/tiny\n"
        "──────────────────────────────────────────────────────────────────────────────"
    )


def test_result_block_of_some_stages():
    stages = {"one": {"steps": 3, "seconds": 1.0}}
    summary = {"name": "run", "seconds": 1.0, "stages": stages, "stages_in_all": 4}
    assert "run: 1 of 4 stages finished" in result_block(summary)


def test_result_block_counts_the_samples_that_were_bad_or_cut():
    summary = copy.deepcopy(SUMMARY)
    summary["stages"]["align"]["samples"] = {"total": 9000}
    assert "bad or cut" not in result_block(summary)
    counts = {"total": 9000, "bad": {"missing_file": 30}, "truncated": {"too_long": 1200}}
    summary["stages"]["tune"]["samples"] = counts
    text = result_block(summary)
    assert re.search(
        r"\ntune +bad: missing_file +30 of 9,000\ntune +trunc.* 1,200 of 9,000\n", text
    )


def test_a_pipe_gets_plain_text_whatever_the_terminal_is(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_result_block(SUMMARY)
    shown = capsys.readouterr().out
    monkeypatch.undo()
    assert shown == result_block(SUMMARY) + "\n"
    assert not ESCAPE.search(shown)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_a_terminal_gets_the_same_words(variables, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    styled = result_block(SUMMARY, colours=True)
    assert bool(ESCAPE.search(styled)) == (variables.get("TERM") != "dumb")
    words = [line.rstrip() for line in ESCAPE.sub("", styled).splitlines()]
    assert words == result_block(SUMMARY).splitlines()


def test_names_are_shown_as_they_are():
    """rich would read [bold] as a style and :smile: as a picture."""
    stages = {"[bold]x[/bold] :smile:": {"steps": 3, "seconds": 1.0}}
    text = result_block({"name": "[red]r", "seconds": 1.0, "stages": stages}, "runs/[x]")
    assert "[bold]x[/bold] :smile:" in text and "[red]r:" in text and "runs/[x]" in text
