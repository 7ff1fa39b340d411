"""Parts of the doctor that a fake environment does not reach cheaply."""

import configparser
import importlib.util
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tests.doctor.fake_environment import REPOSITORY
from unimoe_jax.doctor import requirements
from unimoe_jax.doctor.checks import Check, has_failed
from unimoe_jax.doctor.folders import check_folder
from unimoe_jax.doctor.machine import check_machine
from unimoe_jax.doctor.packages import check_without_metadata, module_of, required
from unimoe_jax.doctor.printing import as_text
from unimoe_jax.doctor.requirements import Requirement, is_at_least, parse, read_metadata

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("version", "minimum", "enough"),
    [
        ("2.10", "2.9", True),
        ("2.9", "2.10", False),
        ("2.10", "2.10.0", True),
        ("2.10.0a0+build", "2.10", True),
        ("0.10.2", "0.10.10", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version, minimum, enough):
    assert is_at_least(version, minimum) == enough


def test_requirement_lines():
    lines = [
        "orbax-checkpoint>=0.12.8",
        "protobuf",
        "torch>=2.10; extra == 'convert'",
        'jax[cuda13] ; extra == "gpu"',
        "numpy<3,>=2.1",
        "pytest>=8; extra == 'test'",
    ]
    assert parse(lines) == [
        Requirement("orbax-checkpoint", "0.12.8"),
        Requirement("protobuf"),
        Requirement("torch", "2.10", "convert"),
        Requirement("jax", "", "gpu", "cuda13"),
        Requirement("numpy", "2.1"),
    ]


def test_a_checkout_that_is_not_installed_is_checked_against_setup_cfg(monkeypatch):
    def not_found(name):
        raise requirements.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements.importlib.metadata, "metadata", not_found)
    metadata = read_metadata()
    assert metadata is not None
    assert metadata.source == "checkout" and metadata.python_minimum == "3.11"
    assert Requirement("flax", "0.12.8") in metadata.requirements
    assert Requirement("jax", "", "tpu", "tpu") in metadata.requirements


def test_a_package_without_any_metadata_is_a_failure():
    (check,) = check_without_metadata()
    assert check.status == "failure" and "pip install" in check.remedy


def test_the_module_of_every_requirement_is_known():
    metadata = read_metadata()
    assert metadata is not None and len(required(metadata)) > 5
    for requirement in required(metadata):
        assert importlib.util.find_spec(module_of(requirement)), requirement


def test_the_package_uses_no_marker_but_extra():
    """`parse` reads no other."""
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    extras = [text for _, text in settings.items("options.extras_require")]
    assert not re.search(";", "".join([settings["options"]["install_requires"], *extras]))


@pytest.mark.parametrize(
    ("free", "status"), [(100, "failure"), (5 * 2**30, "warning"), (50 * 2**30, "ok")]
)
def test_free_disk_space(free, status, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, free))
    check = check_folder("runs", tmp_path / "a" / "b", "set output")
    assert check.status == status
    assert (check.remedy == "") == (status == "ok")


def test_little_shared_memory_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    *_, check = check_machine(shared_memory=tmp_path)
    assert check.status == "warning" and check.value.startswith("64 MiB, 64 MiB free")
    assert "--shm-size" in check.remedy and "data.loader.workers=0" in check.remedy


def test_the_memory_limit_of_a_container_is_shown(tmp_path):
    (tmp_path / "memory.max").write_text("536870912\n")
    checks = check_machine(tmp_path / "none", tmp_path / "memory.max")
    assert [check.name for check in checks] == ["CPU", "memory"]
    assert checks[1].value.endswith("; this container is limited to 512 MiB")
    assert "limited" not in check_machine(memory_limit=Path("/none"))[1].value


CHECKS = [
    Check("versions", "jax", "ok", "0.10.2"),
    Check("versions", "[red]x", "failure", "is not installed", "pip install x"),
    Check("machine", "CPU", "ok", "2 cores"),
]


def test_the_text_in_a_terminal_has_the_same_words():
    plain = as_text(CHECKS)
    coloured = as_text(CHECKS, colours=True)
    assert "\x1b" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert plain.splitlines() == [
        "versions",
        "  ok      jax     0.10.2",
        "  FAILED  [red]x  is not installed",
        "                  → pip install x",
        "",
        "machine",
        "  ok      CPU     2 cores",
        "",
        "1 check has failed: [red]x. The arrows say what to do.",
    ]
    assert has_failed(CHECKS) and not has_failed(CHECKS[:1])


def test_the_text_needs_no_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert as_text(CHECKS, colours=True) == as_text(CHECKS)
