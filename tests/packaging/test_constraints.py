"""The constraints files pin what setup.cfg asks for, and all pins fit together.

The fast tests read metadata only. The slow test asks a resolver and the package index.
"""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FILES = {"3.11": "constraints.txt", "3.12": "constraints-3.12.txt"}
ROOT = Path(__file__).parents[2]
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"

# Extras that are planned. Their packages are pinned before their code is written, so that no pin
# has to change when an extra is added to setup.cfg. Remove a line here when that has happened.
PLANNED = {
    "serve": ("fastapi", "uvicorn", "sse-starlette", "prometheus-client", "openai"),
    "demo": ("gradio>=6",),
    "remote": ("fsspec", "s3fs", "aiobotocore", "botocore", "moto[server]"),
    "trackers": ("wandb", "mlflow"),
    "data": ("datasets", "pyarrow"),
    "adapters": ("peft",),
    "notebooks": ("nbformat", "nbclient"),
}


def read_lines(path: Path) -> list[str]:
    """The lines of a constraints file without its comments."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def read_pins(path: Path) -> dict[str, Version]:
    """The pinned version of each package, by its canonical name."""
    pairs = [line.split("==") for line in read_lines(path)]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def read_requirements() -> list[Requirement]:
    """What setup.cfg asks for, with every extra, and what the planned extras will ask for."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = [line for text in texts for line in text.splitlines() if line]
    planned = [line for group in PLANNED.values() for line in group]
    return [Requirement(line) for line in lines + planned]


def find_conflicts(
    pairs: Iterable[tuple[str, Requirement]], pins: dict[str, Version]
) -> Iterator[str]:
    """One message for each pair of a source and its requirement that the pins do not satisfy."""
    for source, requirement in pairs:
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            yield f"{source} needs {requirement}, which is not pinned"
        elif not requirement.specifier.contains(pin, prereleases=True):
            yield f"{source} needs {requirement}, but the pin is {pin}"


def applies(requirement: Requirement, extras: set[str]) -> bool:
    """Whether the marker holds in this interpreter for one of the extras, or for none."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras})


def walk_dependencies(
    requirements: list[Requirement], pins: dict[str, Version]
) -> Iterator[tuple[str, Requirement]]:
    """Pairs of a package and a requirement of it, over all packages that are reached.

    The metadata come from the installed packages. A package is skipped if it is not installed, or
    if its version is not the pinned one, because that version may have other requirements.
    """
    queue = [(canonicalize_name(item.name), frozenset(item.extras)) for item in requirements]
    visited = set(queue)
    while queue:
        name, extras = queue.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(distribution.version) != pins.get(name):
            continue
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if not applies(requirement, set(extras)):
                continue
            yield f"{name} {distribution.version}", requirement
            item = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if item not in visited:
                visited.add(item)
                queue.append(item)


@pytest.mark.fast
@pytest.mark.parametrize("file", FILES.values())
def test_each_line_pins_one_package(file):
    lines = read_lines(ROOT / file)
    wrong = [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.+]*", line)]
    assert not wrong, "a line is `name==version`, with the canonical name and without a marker"
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))


@pytest.mark.fast
@pytest.mark.parametrize(("python", "file"), FILES.items())
def test_the_header_names_the_python_version(python, file):
    assert f"for Python {python};" in (ROOT / file).read_text().splitlines()[0]


@pytest.mark.fast
@pytest.mark.parametrize("file", FILES.values())
def test_pins_satisfy_setup_cfg(file):
    pins = read_pins(ROOT / file)
    pairs = [("setup.cfg", requirement) for requirement in read_requirements()]
    assert list(find_conflicts(pairs, pins)) == []


@pytest.mark.fast
@pytest.mark.skipif(RUNNING not in FILES, reason=f"no constraints file is for Python {RUNNING}")
def test_pins_satisfy_the_installed_packages():
    pins = read_pins(ROOT / FILES[RUNNING])
    pairs = list(walk_dependencies(read_requirements(), pins))
    # Hundreds of pairs are expected. Few pairs mean that the environment was made without the pins.
    assert len(pairs) > 100, f"install the tests with -c {FILES[RUNNING]}"
    assert list(find_conflicts(pairs, pins)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("python", "file"), FILES.items())
def test_constraints_resolve_with_every_extra(python, file, tmp_path):
    """A resolver needs exactly the pinned packages: none is missing, and no pin is left over."""
    (tmp_path / "all.in").write_text("\n".join(map(str, read_requirements())))
    command = [sys.executable, "-m", "uv", "--no-config", "pip", "compile", "all.in"]
    command += ["--constraint", str(ROOT / file), "--python-version", python]
    # libtpu has wheels for glibc 2.31 and newer only.
    command += ["--python-platform", "x86_64-manylinux_2_31"]
    command += ["--no-header", "--no-annotate", "--quiet", "--output-file", "resolved.txt"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert read_lines(tmp_path / "resolved.txt") == read_lines(ROOT / file)
