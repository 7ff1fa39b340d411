"""Train, convert, run and study multimodal mixture-of-experts language models.

    unimoe VERB …
    unimoe VERB --help
    unimoe --version

`unimoe VERB …` does the same as `python -m unimoe_jax.VERB …`, in this process: with the same
arguments, output and exit code. A word that is no verb ends with exit code 2.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import unimoe_jax
from unimoe_jax.runtime.pipes import exit_quietly_on_closed_pipe

# Only the standard library and light modules are imported here, so that `unimoe --help` is fast.
# A verb's module, and jax with it, is imported when the verb is called.

VERBS = ("train", "evaluate", "report", "generate", "convert", "experts", "compile", "doctor")
"""In the order in which `--help` lists them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. Without `arguments`, take those of the process."""
    is_process = arguments is None
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(help_text(), file=sys.stderr)
        return 2
    verb, *rest = words
    if verb in ("-h", "--help"):
        return exit_quietly_on_closed_pipe(lambda: _show(help_text()))
    if verb == "--version":
        return exit_quietly_on_closed_pipe(lambda: _show(f"unimoe_jax {unimoe_jax.__version__}"))
    if verb not in VERBS:
        print(f"error: {_unknown(verb)}", file=sys.stderr)
        return 2
    if verb == "train" and is_process:
        # As `python -m unimoe_jax.train` does. The restart replaces this process, so it comes
        # before the slow imports; a caller that passed `arguments` keeps its process.
        from unimoe_jax.runtime.memory import restart_with_huge_pages

        restart_with_huge_pages()
    return importlib.import_module(f"unimoe_jax.{verb}.__main__").main(rest)


def help_text() -> str:
    """The text of `unimoe --help`: one line per verb."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary_of(verb)}" for verb in VERBS]
    return "\n".join(
        [
            "usage: unimoe VERB …",
            "",
            (__doc__ or "").split("\n", 1)[0],
            "",
            "verbs:",
            *lines,
            "",
            "`unimoe VERB --help` explains a verb; `unimoe --version` shows the version.",
            "`python -m unimoe_jax.VERB` does the same as `unimoe VERB`.",
        ]
    )


def summary_of(verb: str) -> str:
    """The first line of the docstring of a verb's module, which is read but not imported."""
    source = Path(__file__).parents[1] / verb / "__main__.py"
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n", 1)[0]


def _show(text: str) -> int:
    print(text)
    return 0


def _unknown(word: str) -> str:
    """The message about a word that is no verb, with the most similar verb."""
    similar = difflib.get_close_matches(word.removeprefix("unimoe_jax."), VERBS, n=1)
    advice = f"did you mean `unimoe {similar[0]}`?" if similar else f"use {', '.join(VERBS)}"
    return f"unimoe {word}: there is no such verb; {advice}"


if __name__ == "__main__":
    sys.exit(main())
