"""The console command `unimoe`: every verb, as `python -m unimoe_jax.VERB` runs it."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

import unimoe_jax
from unimoe_jax.cli.__main__ import VERBS, help_text, main, summary_of
from unimoe_jax.runtime.program import program_name

REPOSITORY = Path(__file__).parents[2]

# The script that pip writes for a console entry point.
SCRIPT = """
import sys
from unimoe_jax.cli.__main__ import main
if __name__ == "__main__":
    sys.exit(main())
"""

# The same, but it prints where it starts, and the kernel's setting comes from a file.
RESTARTED = """
import os, sys
from pathlib import Path
from unimoe_jax.runtime import memory
from unimoe_jax.cli.__main__ import main
memory.HUGE_PAGES_ENABLED = Path(os.environ["ENABLED"])
print("start", os.getpid(), os.environ.get("GLIBC_TUNABLES"), "jax" in sys.modules, flush=True)
sys.exit(main())
"""


@pytest.fixture
def command(tmp_path):
    """Run a script called `unimoe`, in a folder without the package."""
    script = tmp_path / "bin" / "unimoe"
    script.parent.mkdir()

    def run(*words: str, text: str = SCRIPT, module: str | None = None, **variables: str):
        script.write_text(text)
        start = ["-m", module] if module else [str(script)]
        return subprocess.run(
            [sys.executable, *start, *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables,
            capture_output=True,
            text=True,
        )

    return run


# ----------------------------------------------------------------------------------- the list


def test_every_verb_is_listed():
    folders = {path.parent.name for path in Path(unimoe_jax.__file__).parent.glob("*/__main__.py")}
    assert set(VERBS) == folders - {"cli"}


def test_help_has_one_line_per_verb():
    lines = help_text().splitlines()
    for verb in VERBS:
        summary = summary_of(verb)
        assert summary.endswith((".", "?")) and len(summary) > 20
        assert any(line.split(None, 1) == [verb, summary] for line in lines)


def test_help_imports_nothing_heavy(command):
    """The interpreter alone takes most of the time of `unimoe --help`."""
    code = "import sys\nfrom unimoe_jax.cli.__main__ import main\nmain(['--help'])\n"
    code += "print(*sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)"
    done = command(text=code)
    loaded = set(done.stderr.split())
    assert done.returncode == 0 and "unimoe_jax" in loaded
    assert not loaded & {"jax", "numpy", "pydantic", "rich", "yaml", "flax", "jinja2"}
    start = time.monotonic()
    assert command("--help").stdout == done.stdout
    assert time.monotonic() - start < 5  # measured: 0.1 s; a busy machine takes longer


def test_version(command):
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"unimoe_jax {unimoe_jax.__version__}\n")


def test_no_verb(command):
    done = command()
    assert done.returncode == 2 and not done.stdout and "usage: unimoe VERB" in done.stderr


@pytest.mark.parametrize(
    ("word", "advice"),
    [("trian", "`unimoe train`?"), ("Report", "`unimoe report`?"), ("zzz", "use train, evaluate,")],
)
def test_a_wrong_verb_is_one_line(word, advice, capsys):
    assert main([word, "--config", "x"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: unimoe {word}: there is no such verb;") and advice in line
    assert not captured.out


def test_a_reader_who_has_gone(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "unimoe_jax.cli", "--help"],
            cwd=REPOSITORY,
            stdout=out,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 141 and not done.stderr


# ------------------------------------------------------------------------------- every verb


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_gets_its_arguments_and_gives_its_exit_code(verb, monkeypatch):
    module = importlib.import_module(f"unimoe_jax.{verb}.__main__")
    seen = []
    monkeypatch.setattr(module, "main", lambda arguments: seen.append(arguments) or 7)
    assert main([verb, "--flag", "two words", "key=value"]) == 7
    assert seen == [["--flag", "two words", "key=value"]]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_names_the_command_that_was_called(verb, monkeypatch, capsys):
    """Usage, and the messages about wrong arguments, begin with it."""
    shown = {}
    for program in ("/usr/bin/unimoe", "C:/Scripts/unimoe.exe", f"/x/{verb}/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program, verb])
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        shown[program] = capsys.readouterr().out
    first, second, third = shown.values()
    assert first == second
    assert first.startswith(f"usage: unimoe {verb} ")
    assert third.startswith(f"usage: python -m unimoe_jax.{verb} ")
    assert program_name("train") == "python -m unimoe_jax.train"


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "missing"],
        ["report"],
        ["generate", "--model", "missing", "--prompt", "x", "--chat"],
        ["train", "--config", "missing.yaml"],
    ],
    ids=" ".join,
)
def test_the_console_command_equals_the_module(arguments, command):
    """Exit code, standard output and standard error, apart from the name in the usage."""
    verb, *rest = arguments
    one = command(*arguments)
    other = command(*rest, module=f"unimoe_jax.{verb}")
    assert one.returncode == other.returncode == 2
    assert one.stdout == other.stdout == ""

    def words(text: str) -> list[str]:
        # argparse breaks the lines of the usage according to the length of the name.
        return text.replace(f"python -m unimoe_jax.{verb}", f"unimoe {verb}").split()

    assert words(one.stderr) == words(other.stderr) != []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_train_restarts_with_huge_pages_before_it_imports_jax(command, tmp_path, monkeypatch):
    """As `python -m unimoe_jax.train` does; other verbs, and callers of `main`, do not."""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    (tmp_path / "enabled").write_text("always [madvise] never")
    variables = {"ENABLED": str(tmp_path / "enabled")}
    done = command("train", "--config", "two words.yaml", text=RESTARTED, **variables)
    first, second = [line.split() for line in done.stdout.splitlines()]
    assert first[1] == second[1]  # the process is replaced, so a launcher sees no other
    assert first[2:] == ["None", "False"] and second[2:] == ["glibc.malloc.hugetlb=1", "False"]
    assert done.returncode == 2 and "two words.yaml" in done.stderr
    done = command("report", "missing", text=RESTARTED, **variables)
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 1
    in_process = RESTARTED.replace("main()", "main(['train'])")
    done = command(text=in_process, **variables)
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 1
