# SPDX-License-Identifier: BSD-3-Clause
"""Builds the extension ahead of time; everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# The package's own build modules under another name: importing resnorm_ext itself would need what is being built.
_build_modules = types.ModuleType("resnorm_build")
_build_modules.__path__ = [str(ROOT / "resnorm_ext" / "build")]
sys.modules["resnorm_build"] = _build_modules
from resnorm_build import config, toolchain  # noqa: E402
from resnorm_build.compile import BuildExtension  # noqa: E402

# --no-build-isolation takes the packages that are there, whatever pyproject.toml asks for. A source distribution needs
# none.
if {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"} & set(sys.argv):
    try:
        toolchain.check_packages()
    except toolchain.BuildError as error:
        sys.exit(f"resnorm_ext: {error}")


class BuildPython(build_py):
    """Adds the C++ sources to the package, for the JIT; an editable install finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "resnorm_ext" / "_csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


def version_and_torch() -> tuple[str, str]:
    """A built package is named by what it is built for (0.1.0+cu130.torch2.14) and asks for that PyTorch; a source
    distribution is for all."""
    if "sdist" not in sys.argv:
        try:
            found = toolchain.detect()
            return f"{config.VERSION}+{found.local_version}", f"torch=={config.minor_version(found.torch)}.*"
        except (toolchain.BuildError, ValueError):
            pass  # build_ext will say it, where it is seen
    return config.VERSION, "torch>=2.11"


VERSION, TORCH = version_and_torch()

setup(
    version=VERSION,
    install_requires=[TORCH],
    ext_modules=[Extension("resnorm_ext._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
