"""Fake packages in a folder for PYTHONPATH, so that the real doctor sees broken installations.

The fakes are found before the packages that are really installed. With a fake jax and a fake
torch, and few requirements, the doctor takes less than a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

JAX = """
import os, sys
class Device:
    device_kind = {kind!r}
    def memory_stats(self):
        return {memory!r} and dict(bytes_limit={memory!r})
def devices():
    {first}
    return [Device(), Device()]
def default_backend():
    return {backend!r}
"""


class FakeEnvironment:
    """A folder of fake packages, and the doctor that sees them."""

    def __init__(self, folder: Path):
        self.folder = folder / "packages"
        self.folder.mkdir()
        self.work = folder / "work"
        self.work.mkdir()
        self.variables: dict[str, str] = {"XDG_CACHE_HOME": str(folder / "cache")}
        self.requires("einops>=0.8")
        self.jax()
        self.package("torch", "99")

    def package(self, name: str, version: str, code: str = "") -> None:
        """Install a package whose module runs `code` when it is imported."""
        module = self.folder / name
        module.mkdir(exist_ok=True)
        (module / "__init__.py").write_text(code)
        self.metadata(name, version)

    def metadata(self, name: str, version: str, *lines: str) -> None:
        """Let a package seem to be installed in this version, with more lines of metadata."""
        info = self.folder / f"{name.replace('-', '_')}-0.dist-info"
        info.mkdir(exist_ok=True)
        text = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *lines]
        (info / "METADATA").write_text("\n".join(text) + "\n")

    def requires(self, *requirements: str, python: str = ">=3.11") -> None:
        """Let unimoe_jax ask for these packages."""
        lines = [f"Requires-Dist: {requirement}" for requirement in requirements]
        self.metadata("unimoe_jax", "0.1.0", f"Requires-Python: {python}", *lines)

    def jax(
        self,
        kind: str = "cpu",
        memory: int | None = None,
        backend: str = "cpu",
        first: str = "pass",
    ) -> None:
        """Let jax find two devices of a kind; `first` is a statement that it runs before."""
        code = JAX.format(kind=kind, memory=memory, backend=backend, first=first)
        self.package("jax", "99", code)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the doctor as a user does."""
        return subprocess.run(
            [sys.executable, "-m", "unimoe_jax.doctor", *arguments],
            cwd=self.work,
            env=self.environment(),
            capture_output=True,
            text=True,
        )

    def environment(self) -> dict[str, str]:
        """The variables with which the doctor finds the fakes, then this repository."""
        path = os.pathsep.join([str(self.folder), str(REPOSITORY)])
        kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
        return kept | {"PYTHONPATH": path} | self.variables

    def checks(self, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
        """Run the doctor, and return its exit code and its checks by name."""
        done = self.run("--json", *arguments)
        assert not done.stderr, done.stderr
        content = json.loads(done.stdout)
        assert content["ok"] == (done.returncode == 0)
        for check in content["checks"]:
            assert check["remedy"] or check["status"] == "ok", check
        return done.returncode, {check["name"]: check for check in content["checks"]}
