"""The pages of the reference that MkDocs makes from the code: settings, command line, packages.

MkDocs runs the `on_…` functions below (see `hooks` in mkdocs.yml). Nothing here is written by hand,
so these pages cannot disagree with the program. They can also be read without MkDocs:

    python docs/generated.py settings      (or: commands, packages)
"""

from __future__ import annotations

import ast
import contextlib
import html
import importlib
import inspect
import io
import json
import os
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "unimoe_jax"
VERBS = ("train", "evaluate", "report", "generate", "convert", "experts", "compile", "doctor")

# ---------------------------------------------------------------------------------- settings


def settings_page() -> str:
    """Every section of a run file: its keys, what they may be, their defaults."""
    from unimoe_jax.config import RunConfig
    from unimoe_jax.config.describe import sections

    lines = [
        "# Settings of a run",
        "",
        "This page lists every key of a run file. It is generated from the classes in "
        "`unimoe_jax/config/`, which also check the values. Any key can be changed on the command "
        "line by its dotted path, for example `stages.tune.optim.steps=50`: an item of a list is "
        "named by its number or, if it has a `name`, by that name. `unimoe train --help` prints "
        "the same list.",
    ]
    for section, places in sections(RunConfig).items():
        lines += ["", f"## {_title(places[0])} {{#{section.__name__}}}", ""]
        if len(places) > 1:
            lines += ["Found at " + ", ".join(f"`{place}`" for place in places) + ".", ""]
        if section.__doc__:
            lines += [inspect.cleandoc(section.__doc__), ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        lines += [_row(name, info) for name, info in section.model_fields.items()]
    return "\n".join(lines) + "\n"


def _title(place: str) -> str:
    """A place without the numbers of its lists: `stages.N.optim` -> `stages.optim`."""
    return re.sub(r"\.N\b", "", place) or "The run"


def _row(name: str, info: FieldInfo) -> str:
    from unimoe_jax.config.describe import describe

    value = html.escape(describe(info.rebuild_annotation())).replace("|", "&#124;")
    # Another section is a link to it.
    value = re.sub(r"mapping \((\w+)\)", r'section <a href="#\1">\1</a>', value)
    meaning = (info.description or _summary(info.annotation)).replace("|", "&#124;")
    return f"| `{name}` | {value} | {_default(info)} | {meaning} |"


def _summary(annotation: Any) -> str:
    """The first line of the docstring of the section that a key holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation.__doc__ or "").strip().partition("\n")[0]
    return next(filter(None, map(_summary, typing.get_args(annotation))), "")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "those of the section"
    return f"`{json.dumps(value, ensure_ascii=False, default=_plain)}`"


def _plain(value: Any) -> Any:
    """What JSON cannot show by itself: a section inside a list."""
    return value.model_dump(exclude_unset=True)


# ------------------------------------------------------------------------------ command line


def commands_page() -> str:
    """`--help` of every verb and of its sub-commands."""
    lines = [
        "# Command line",
        "",
        "`unimoe VERB …` and `python -m unimoe_jax.VERB …` are the same program. This page is what "
        "`--help` prints.",
    ]
    for verb in _verbs():
        text = help_of(verb)
        lines += ["", f"## {verb}", "", *_fenced(_without_settings(text))]
        if verb == "train":
            lines += ["", "Every setting is on the page [Settings](settings.md)."]
        for command in _subcommands(text):
            lines += ["", f"### {verb} {command}", "", *_fenced(help_of(verb, command))]
    return "\n".join(lines) + "\n"


def _verbs() -> list[str]:
    """The packages that are programs, in the order of `VERBS`; new ones come last."""
    found = {path.parent.name for path in PACKAGE.glob("*/__main__.py")} - {"cli"}
    return [verb for verb in VERBS if verb in found] + sorted(found - set(VERBS))


def help_of(*command: str) -> str:
    """What `unimoe COMMAND --help` prints, at 100 columns."""
    module = importlib.import_module(f"unimoe_jax.{command[0]}.__main__")
    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            module.main([*command[1:], "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return printed.getvalue()


def _without_settings(text: str) -> str:
    """`train --help` ends with all settings, which have a page of their own."""
    return text.partition("\nsettings (override")[0]


def _subcommands(text: str) -> list[str]:
    found = re.search(r"\{([\w,-]+)\} \.\.\.", text)
    return found[1].split(",") if found else []


def _fenced(text: str) -> list[str]:
    return ["```text", text.strip("\n"), "```"]


# ---------------------------------------------------------------------------------- packages


def package_names() -> list[str]:
    """The packages that import nothing first: `PACKAGES` of the import test, from the ground up."""
    levels = _levels()
    return [name for level in levels for name in level if (PACKAGE / name).is_dir()]


def _levels() -> list[tuple[str, ...]]:
    """`LEVELS` of tests/test_import_direction.py, read without running it."""
    tree = ast.parse((ROOT / "tests" / "test_import_direction.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LEVELS":
            return list(ast.literal_eval(node.value))
    raise LookupError("tests/test_import_direction.py has no LEVELS")


def packages_page() -> str:
    """The table of levels, with the first line of every package."""
    lines = [
        "# Packages",
        "",
        "Every package is one concern, and imports only from the rows above its own. A test checks "
        "this.",
        "",
        "| level | package | what it does |",
        "|---|---|---|",
    ]
    for number, names in enumerate(_levels()):
        for name in names:
            if (PACKAGE / name).is_dir():
                text = _map_of(PACKAGE / name).partition("\n")[0].replace("|", "&#124;")
                lines.append(f"| {number} | [`{name}`](packages/{name}.md) | {text} |")
    return "\n".join(lines) + "\n"


def package_page(name: str) -> str:
    """The map of a package and of the packages inside it: their `__init__` docstrings."""
    lines = [f"# {name}", ""]
    for folder in sorted({path.parent for path in (PACKAGE / name).rglob("__init__.py")}):
        title = folder.relative_to(ROOT).as_posix()
        lines += [f"## {title}", "", *_fenced(_map_of(folder)), ""]
    return "\n".join(lines)


def _map_of(folder: Path) -> str:
    return ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""


# ------------------------------------------------------------------------------------- hooks


def _pages() -> Iterator[tuple[str, str]]:
    yield "reference/settings.md", settings_page()
    yield "reference/commands.md", commands_page()
    yield "reference/packages.md", packages_page()
    for name in package_names():
        yield f"reference/packages/{name}.md", package_page(name)


def on_config(config):
    """Put the pages of the packages into the navigation."""
    sys.path.insert(0, str(ROOT))
    pages = [f"reference/packages/{name}.md" for name in package_names()]
    config.nav[-1]["Reference"].append({"Package by package": pages})
    return config


def on_files(files, config):
    """Add the generated pages to those that lie in docs/."""
    from mkdocs.structure.files import File

    for path, text in _pages():
        files.append(File.generated(config, path, content=text))
    return files


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGES = {"settings": settings_page, "commands": commands_page, "packages": packages_page}
    print(PAGES[sys.argv[1]]())
