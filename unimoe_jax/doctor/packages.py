"""Python, the packages that are required, optional parts, and packages that break others."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import unimoe_jax
from unimoe_jax.doctor.checks import Check
from unimoe_jax.doctor.requirements import (
    PACKAGE,
    Metadata,
    Requirement,
    installed_version,
    is_at_least,
    normal_name,
)

VERSIONS = "versions"
OPTIONAL = "optional parts"
IMPORT_NAMES = {
    "orbax-checkpoint": "orbax.checkpoint",
    "pillow": "PIL",
    "protobuf": "google.protobuf",
    "pyyaml": "yaml",
    "tensorboardx": "tensorboardX",
}
"""Module of a package, by its normalised name, where the two differ in more than `-` and `_`."""
USES = {
    "av": "reads video files",
    "matplotlib": "draws the plots of report.html",
    "tensorboardx": "writes TensorBoard logs",
    "torch": "reads and writes .bin files of PyTorch checkpoints in `convert`",
    "transformers": "is compared with in `convert verify`",
}
"""What an optional package is for, by its normalised name."""
PLUGINS = {
    "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin", "jax-rocm60-plugin"),
    "tpu": ("libtpu",),
}
"""Packages with which jax uses a kind of device; extras of the same names install them."""
TORCH_FAMILY = ("torch", "torchvision", "torchaudio")
"""transformers imports these whenever they are installed, so a broken one breaks it."""


def module_of(requirement: Requirement) -> str:
    """The module that a package provides."""
    name = normal_name(requirement.name)
    return IMPORT_NAMES.get(name, name.replace("-", "_"))


def required(metadata: Metadata) -> list[Requirement]:
    """The packages without which nothing works."""
    return [requirement for requirement in metadata.requirements if not requirement.extra]


def installed_torch_family() -> list[str]:
    """Packages of the torch family that a Python program would find."""
    return [name for name in TORCH_FAMILY if importlib.util.find_spec(name)]


def check_versions(metadata: Metadata, errors: Mapping[str, str | None]) -> list[Check]:
    """Python, this package, and every required package.

    `errors` holds the error of each module that was imported, as `import_errors` returns it.
    """
    checks = [_check_python(metadata.python_minimum), _check_this_package(metadata)]
    for requirement in required(metadata):
        checks.append(_check_required(requirement, errors.get(module_of(requirement))))
        if requirement.name == "jax" and (version := installed_version("jaxlib")):
            checks.append(Check(VERSIONS, "jaxlib", "ok", version))
    return checks


def check_without_metadata() -> list[Check]:
    """The only check of versions that is possible if the package has no metadata: a failure."""
    remedy = f"install it with `pip install {PACKAGE}`, or `pip install -e .` in a checkout"
    value = f"{unimoe_jax.__version__}, without metadata, so no version can be checked"
    return [Check(VERSIONS, PACKAGE, "failure", value, remedy)]


def _check_python(minimum: str) -> Check:
    version = platform.python_version()
    if minimum and not is_at_least(version, minimum):
        remedy = f"make a new environment with python {minimum} or later"
        return Check(VERSIONS, "python", "failure", f"{version} is older than {minimum}", remedy)
    return Check(VERSIONS, "python", "ok", f"{version}{_bound(minimum)}")


def _check_this_package(metadata: Metadata) -> Check:
    folder = Path(unimoe_jax.__file__).parent
    source = "" if metadata.source == "installed" else ", not installed"
    return Check(VERSIONS, PACKAGE, "ok", f"{unimoe_jax.__version__}{source}  {folder}")


def _check_required(requirement: Requirement, import_error: str | None) -> Check:
    name, minimum = requirement.name, requirement.minimum
    remedy = requirement.install_command
    version = installed_version(name)
    if version is None:
        return Check(VERSIONS, name, "failure", "is not installed", remedy)
    if minimum and not is_at_least(version, minimum):
        return Check(VERSIONS, name, "failure", f"{version} is older than {minimum}", remedy)
    if import_error:
        value = f"{version} cannot be imported: {import_error}"
        again = f"reinstall it: pip install --force-reinstall {name}"
        return Check(VERSIONS, name, "failure", value, again)
    return Check(VERSIONS, name, "ok", f"{version}{_bound(minimum)}")


def _bound(minimum: str) -> str:
    return f"  ({minimum} or later)" if minimum else ""


# --------------------------------------------------------------------------- optional parts


def installed_plugins() -> list[str]:
    """The jax plugins that are installed."""
    return [name for names in PLUGINS.values() for name in names if installed_version(name)]


def check_optional(metadata: Metadata, errors: Mapping[str, str | None]) -> list[Check]:
    """Every extra of this package, and the packages that break transformers.

    `errors` holds the import errors of `installed_torch_family`.
    """
    checks = []
    seen = set()
    for requirement in metadata.requirements:
        key = (normal_name(requirement.name), requirement.parts)
        if not requirement.extra or key in seen:
            continue
        seen.add(key)
        if requirement.extra in PLUGINS:
            checks.append(_check_plugin(requirement))
        elif requirement.name not in errors:  # the torch family follows
            checks.append(_check_optional_package(requirement))
    return checks + [_check_torch_family(name, error, metadata) for name, error in errors.items()]


def _check_plugin(requirement: Requirement) -> Check:
    extra = requirement.extra
    name = f"jax for {extra.upper()}s"
    found = [plugin for plugin in PLUGINS[extra] if installed_version(plugin)]
    if found:
        versions = ", ".join(f"{plugin} {installed_version(plugin)}" for plugin in found)
        return Check(OPTIONAL, name, "ok", versions)
    return Check(OPTIONAL, name, "absent", "is not installed", requirement.extra_command)


def _check_optional_package(requirement: Requirement) -> Check:
    name, minimum = requirement.name, requirement.minimum
    use = USES.get(normal_name(name), f"belongs to {PACKAGE}[{requirement.extra}]")
    version = installed_version(name)
    if version is None:
        return Check(OPTIONAL, name, "absent", use, requirement.extra_command)
    if minimum and not is_at_least(version, minimum):
        value = f"{version} is older than {minimum}; it {use}"
        return Check(OPTIONAL, name, "warning", value, requirement.install_command)
    return Check(OPTIONAL, name, "ok", f"{version}  {use}")


def _check_torch_family(name: str, error: str | None, metadata: Metadata) -> Check:
    """torch, torchvision or torchaudio, which is installed; `error` if it cannot be imported."""
    version = installed_version(name) or "of unknown version"
    if error is None:
        return _check_installed_torch(name, version, metadata.requirements)
    torch_version = installed_version("torch")
    partner = f" with torch {torch_version}" if torch_version and name != "torch" else ""
    value = (
        f"{version} cannot be imported{partner} ({error}); transformers imports {name} whenever "
        "it is installed, so it fails too"
    )
    remedy = (
        f"pip uninstall {name} ({PACKAGE} works without it), or install the version that fits: "
        f"pip install --upgrade --force-reinstall {'torch ' if partner else ''}{name}"
    )
    return Check(OPTIONAL, name, "failure", value, remedy)


def _check_installed_torch(name: str, version: str, requirements: Sequence[Requirement]) -> Check:
    for requirement in requirements:
        if requirement.extra and normal_name(requirement.name) == name:
            return _check_optional_package(requirement)
    return Check(OPTIONAL, name, "ok", f"{version}  is not needed, and does no harm")
