"""The checks as text for people, or as JSON for programs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from unimoe_jax.doctor.checks import Check, has_failed

WORDS = {"ok": "ok", "absent": "absent", "warning": "note", "failure": "FAILED"}
STYLES = {"ok": "green", "absent": "dim", "warning": "yellow", "failure": "bold red"}

Part = tuple[str, str]
"""A piece of text and its style in a terminal."""


def as_json(checks: Sequence[Check]) -> str:
    """{"ok": whether nothing failed, "checks": one object per check}."""
    content = {"ok": not has_failed(checks), "checks": [asdict(check) for check in checks]}
    return json.dumps(content, indent=2, ensure_ascii=False)


def as_text(checks: Sequence[Check], *, colours: bool = False) -> str:
    """One line per check below the heading of its section, and a conclusion."""
    lines = list(_lines(checks))
    if not colours:
        return "\n".join("".join(text for text, _ in line) for line in lines)
    try:
        return _coloured(lines)
    except ImportError:  # rich is among the packages that may be missing
        return as_text(checks)


def _lines(checks: Sequence[Check]) -> Iterator[list[Part]]:
    status_width = max(map(len, WORDS.values()))
    name_width = max(len(check.name) for check in checks)
    indent = " " * (2 + status_width + 2 + name_width + 2)
    section = None
    for check in checks:
        if check.section != section:
            if section is not None:
                yield []
            section = check.section
            yield [(section, "bold")]
        style = STYLES[check.status]
        first, *others = [text for text in (check.value, _advice(check)) if text]
        word = WORDS[check.status].ljust(status_width)
        name = check.name.ljust(name_width)
        yield [(f"  {word}", style), (f"  {name}  ", ""), (first, "")]
        for text in others:
            yield [(indent + text, style)]
    yield []
    yield _conclusion(checks)


def _advice(check: Check) -> str:
    """The remedy, marked with an arrow."""
    return f"→ {check.remedy}" if check.remedy else ""


def _conclusion(checks: Sequence[Check]) -> list[Part]:
    failed = [check.name for check in checks if check.status == "failure"]
    if failed:
        count = "1 check has" if len(failed) == 1 else f"{len(failed)} checks have"
        return [(f"{count} failed: {', '.join(failed)}. The arrows say what to do.", "bold red")]
    return [("Everything that is needed works.", "bold green")]


def _coloured(lines: Sequence[Sequence[Part]]) -> str:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, soft_wrap=True)
    with console.capture() as capture:
        for line in lines:
            console.print(Text.assemble(*line))
    return capture.get().rstrip("\n")
