"""Put the run files of configs/ into the wheel; setup.cfg holds everything else.

The run files stay at the root of the repository. An installed package needs them too, so a wheel
holds them as `unimoe_jax/configs`. The option `package_dir` of setup.cfg could map that folder, but
it would also change how setuptools makes an editable install (see the comment there). An editable
install gets no copy, because a copy would hide later edits: it uses configs/ of the repository.
"""

from pathlib import Path
from shutil import copytree, rmtree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPyWithConfigs(build_py):
    """Build the package, then copy configs/ into it unless the install is editable."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "unimoe_jax", "configs")
        # A build folder survives from one build to the next, and with it files that were since
        # renamed or removed. They must not reach the wheel.
        rmtree(target, ignore_errors=True)
        copytree("configs", target)


setup(cmdclass={"build_py": BuildPyWithConfigs})
