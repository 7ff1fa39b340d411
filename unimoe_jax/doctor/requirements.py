"""The packages and versions that unimoe_jax asks for, from its own metadata."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PACKAGE = "unimoe_jax"
DEVELOPMENT_EXTRAS = {"all", "dev", "docs", "lint", "test"}
"""Extras that only developers of the package install; doctor does not report them."""
_REQUIREMENT = re.compile(r"\s*(?P<name>[\w.-]+)\s*(\[(?P<parts>[^\]]*)\])?(?P<versions>[^;]*)")
_MINIMUM = re.compile(r">=\s*([\w.]+)")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w.-]+)['\"]")


class Requirement(NamedTuple):
    """A package that unimoe_jax needs.

    Attributes:
        name: of the package, as in `pip install NAME`.
        minimum: lowest version that works; "" if any does.
        extra: the optional part of unimoe_jax that needs the package; "" if all parts do.
        parts: extras of the package itself, as `cuda13` in `jax[cuda13]`.
    """

    name: str
    minimum: str = ""
    extra: str = ""
    parts: str = ""

    @property
    def install_command(self) -> str:
        """The command that installs the package, or a version that is new enough."""
        version = f">={self.minimum}" if self.minimum else ""
        return f"pip install --upgrade '{self.name}{version}'"

    @property
    def extra_command(self) -> str:
        """The command that installs the optional part that the package belongs to."""
        return f"pip install '{PACKAGE}[{self.extra}]'"


class Metadata(NamedTuple):
    """What the package says about itself: its source, Python versions and requirements."""

    source: str
    python_minimum: str
    requirements: list[Requirement]


def read_metadata() -> Metadata | None:
    """The metadata of the installed package, or setup.cfg of a checkout; None without both."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return _from_setup_cfg(Path(__file__).parents[2] / "setup.cfg")
    python_versions = metadata.get_all("Requires-Python") or [""]
    return Metadata(
        "installed",
        _minimum(python_versions[0]),
        parse(metadata.get_all("Requires-Dist") or []),
    )


def _from_setup_cfg(path: Path) -> Metadata | None:
    settings = configparser.ConfigParser()
    if not settings.read(path, encoding="utf-8") or not settings.has_section("options"):
        return None
    lines = settings.get("options", "install_requires", fallback="").splitlines()
    if settings.has_section("options.extras_require"):
        for extra, packages in settings.items("options.extras_require"):
            lines += [f"{line}; extra == '{extra}'" for line in packages.splitlines() if line]
    python = settings.get("options", "python_requires", fallback="")
    return Metadata("checkout", _minimum(python), parse(line for line in lines if line))


def parse(lines: Iterable[str]) -> list[Requirement]:
    """Read lines such as `torch>=2.10; extra == "convert"`; leave out what only developers need.

    `extra` is the only marker after `;` that is read, because the package uses no other.
    """
    requirements = []
    for line in lines:
        match = _REQUIREMENT.match(line)
        extra = _EXTRA.search(line)
        if match is None or (extra and extra[1] in DEVELOPMENT_EXTRAS):
            continue
        if normal_name(match["name"]) == normal_name(PACKAGE):  # an extra that joins others
            continue
        requirements.append(
            Requirement(
                match["name"],
                _minimum(match["versions"]),
                extra[1] if extra else "",
                match["parts"] or "",
            )
        )
    return requirements


def _minimum(versions: str) -> str:
    match = _MINIMUM.search(versions)
    return match[1] if match else ""


def normal_name(name: str) -> str:
    """Package names that differ only in case, `-`, `_` and `.` are the same (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_at_least(version: str, minimum: str) -> bool:
    """Whether a version reaches a minimum, by its numbers alone: `2.10.0a0+nv` reaches `2.10`.

    Vendors ship such builds as the release that follows, so a pre-release counts like it.
    """
    return _release(version) >= _release(minimum)


def _release(version: str) -> list[int]:
    """The leading numbers of a version, without zeros at the end: `2.10.0rc1` -> [2, 10]."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers
