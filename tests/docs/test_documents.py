"""The documents: links and paths exist, every command is known, and MkDocs builds them."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.markdown import DOCUMENTS, ROOT, SHELL, Block, blocks, links, named_paths, words_of
from tests.test_import_direction import LEVELS, ONLY
from unimoe_jax.config import RunConfig

PACKAGE = ROOT / "unimoe_jax"
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
NEEDS = {"cluster", "gpu", "tpu", "downloaded weights", "network", "the extra [tpu]"}
LANGUAGES = {"text", "yaml", "json", "python", *SHELL}
# What a command line begins with. In a block of another language it would not be checked.
COMMAND = re.compile(
    r"^\$? ?(unimoe [a-z]|python3? -m|pip |launch/|sbatch |kubectl |mkdocs )", re.M
)
# Folders of the repository, and of the package, whose files the documents name.
FOLDERS = {path.name for path in [*ROOT.iterdir(), *PACKAGE.iterdir()] if path.is_dir()}
FOLDERS -= {"runs", "build", "checkpoints", "site", "__pycache__"}

pytestmark = pytest.mark.fast


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def generated():
    """The module docs/generated.py."""
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs/generated.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------- links and paths


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document):
    made = {"settings.md", "commands.md", "packages.md"}
    for link in links(document):
        target = (document.parent / link).resolve()
        is_made = target.parent == ROOT / "docs/reference" and target.name in made
        assert target.exists() or is_made, f"{relative(document)}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_named_files_exist(document):
    for name in named_paths(document):
        if name.split("/")[0] not in FOLDERS and not name.endswith((".py", ".sh", ".cfg", ".toml")):
            continue
        places = (ROOT, PACKAGE, document.parent)
        found = any(any(place.glob(name.rstrip("/"))) for place in places)
        found = found or ("/" not in name and any(PACKAGE.rglob(name)))
        titles = {block.title for block in blocks(document)}
        assert found or name in titles, f"{relative(document)}: {name} does not exist"


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    assert (ROOT / "docs/images/report.png").stat().st_size < 300_000


# --------------------------------------------------------------------------------- commands


def is_known(block: Block, command: str) -> bool:
    """Whether tests/docs/test_commands.py runs the command."""
    _, words = words_of(command)
    if words[0] == "python":
        return words[1] in {other.title for other in blocks(block.document)}
    return words[0] == "unimoe" and (PACKAGE / words[1] / "__main__.py").exists()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_every_command_is_run_or_says_why_not(block):
    assert block.language in LANGUAGES, f"{block.where}: language {block.language!r}"
    if block.kind == "needs":
        assert block.value in NEEDS, f"{block.where}: needs {block.value!r}; known: {NEEDS}"
    elif block.kind == "covered by":
        assert (ROOT / block.value).exists(), f"{block.where}: {block.value} does not exist"
    elif block.language in SHELL:
        for command in block.commands():
            assert is_known(block, command), (
                f"{block.where}: no test runs {command!r}; make it one that tests/docs can run, or "
                "mark the block, for example with <!-- needs: cluster -->"
            )
    else:
        assert not COMMAND.search(block.text), f"{block.where}: commands belong into a bash block"


def test_programs_that_the_text_names_are_run():
    """A Python block with a file name is written, and a later command of the document runs it."""
    for block in BLOCKS:
        if block.language == "python" and block.title:
            later = [other for other in blocks(block.document) if other.language in SHELL]
            assert any(f"python {block.title}\n" in other.text for other in later), block.where


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda block: block.where
)
def test_yaml_can_be_read(block):
    assert yaml.safe_load(block.text)


def test_the_tests_command_is_one_line():
    """`.ci/run` takes the first fenced block of this section."""
    section = (ROOT / "README.md").read_text().split("\n## Tests\n")[1]
    command = section.split("```")[1].partition("\n")[2].strip()
    assert "\n" not in command and "pytest" in command


# ------------------------------------------------------------------------------- the levels


def test_contributing_has_the_levels_of_the_import_test():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+?) \|$", text, re.M)
    found = tuple(tuple(re.findall(r"`(\w+)`", names)) for _, names in rows)
    assert found == LEVELS
    only = re.findall(r"^\| `(\w+)` \| (.+?) \|$", text, re.M)
    assert {name: set(re.findall(r"`(\w+)`", others)) for name, others in only} == ONLY


# ------------------------------------------------------------------------ generated pages


def test_the_settings_page_has_every_key():
    page = generated().settings_page()
    for name in RunConfig.model_fields:
        assert f"| `{name}` |" in page
    for anchor in re.findall(r'href="#(\w+)"', page):
        assert f"{{#{anchor}}}" in page


def test_the_commands_page_has_every_verb():
    page = generated().commands_page()
    for path in PACKAGE.glob("*/__main__.py"):
        if path.parent.name != "cli":
            assert f"## {path.parent.name}\n" in page
            assert f"usage: python -m unimoe_jax.{path.parent.name}" in page
    assert "### convert import\n" in page and "### experts upcycle\n" in page


def test_every_package_has_a_page():
    module = generated()
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(module.package_names()) == folders
    docstring = ast.get_docstring(ast.parse((PACKAGE / "config/__init__.py").read_text()))
    assert docstring in module.package_page("config")


def test_mkdocs_builds_without_a_warning(tmp_path):
    assert importlib.util.find_spec("mkdocs"), "mkdocs is part of the extra [docs]"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unimoe_jax" in (tmp_path / "index.html").read_text()
    reference = (tmp_path / "reference/python.html").read_text()
    assert "max_new_tokens" in reference
