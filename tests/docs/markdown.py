"""Fenced blocks, commands, links and paths in the Markdown files of the repository."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "benchmarks/README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
SHELL = ("bash", "sh", "console")

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<rest>.*)$")
_MARK = re.compile(r"^ *<!-- (?P<kind>needs|covered by): (?P<value>.+) -->$")
_TITLE = re.compile(r'title="([^"]+)"')
_ASSIGNMENT = re.compile(r"^\w+=")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    line: where it begins. title: the file name that the text gives it. kind, value: the comment
    before it, for example `needs` and `cluster`; empty without one.
    """

    document: Path
    line: int
    language: str
    title: str
    text: str
    kind: str = ""
    value: str = ""

    @property
    def where(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """The commands of a shell block; lines that end with a backslash are joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    found: list[Block] = []
    mark: re.Match | None = None
    lines = iter(enumerate(document.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        fence = _FENCE.match(line)
        if not fence:
            # A comment belongs to the block right after it.
            mark = _MARK.match(line) or (mark if not line.strip() else None)
            continue
        body = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            body.append(inner.removeprefix(fence["indent"]))
        title = _TITLE.search(fence["rest"])
        kind, value = (mark["kind"], mark["value"]) if mark else ("", "")
        text = "\n".join(body) + "\n"
        name = title[1] if title else ""
        found.append(Block(document, number, fence["language"], name, text, kind, value))
        mark = None
    return found


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """(environment, words): `A=1 unimoe doctor` -> ({"A": "1"}, ["unimoe", "doctor"])."""
    words = shlex.split(command, comments=True)
    environment = {}
    while words and _ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    return environment, words


def prose(document: Path) -> str:
    """The text of a document without its fenced blocks."""
    kept, inside = [], False
    for line in document.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def links(document: Path) -> Iterator[str]:
    """The targets of all links to files, without their anchors."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        path = target.partition("#")[0]
        if path and "://" not in path and not path.startswith("mailto:"):
            yield path


def named_paths(document: Path) -> Iterator[str]:
    """Words in backticks that look like files or folders of the repository.

    Names in capitals, such as `RUN/checkpoints/STAGE/final`, stand for something else.
    """
    for code in re.findall(r"`([^`\n]+)`", prose(document)):
        for word in code.split():
            is_path = re.fullmatch(r"\.?[\w*-]+([./][\w*-]+)+/?|\.?[\w-]+/", word)
            if is_path and not re.search(r"[A-Z]{3,}(?!_?\w*\.md)", word):
                yield word
