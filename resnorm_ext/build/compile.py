# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the extension ahead of time: setuptools' ``build_ext``, with ninja as what compiles."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

from . import library, ninja, toolchain

EXTENSION = "resnorm_ext._C"


class BuildExtension(build_ext):
    """setuptools' own, but for what compiles, and with the library's description beside the library."""

    def run(self) -> None:
        try:
            self.toolchain = toolchain.detect()  # not before: a source distribution is made without any
        except (toolchain.BuildError, ValueError) as error:
            raise SystemExit(f"resnorm_ext: {error}") from None  # what setuptools was about to do is no help
        if self.editable_mode:  # pip's own folder for objects does not outlast the build
            self.build_temp = "build/editable"
        # A folder for each toolchain, because ninja does not see one change behind the same path.
        self.build_temp = f"{self.build_temp}-{self.toolchain.key[:8]}"
        print(f"resnorm_ext: building {self.toolchain.kernels}", flush=True)
        super().run()

    def build_extension(self, extension: setuptools.Extension) -> None:
        built = Path(self.get_ext_fullpath(extension.name))
        library.info_path(built).unlink(missing_ok=True)
        ninja.write(self.toolchain, Path(self.build_temp))
        command = ninja.command(self.toolchain, verbose=self.verbose > 1)
        if subprocess.run(command, cwd=self.build_temp, env=ninja.environment()).returncode != 0:
            raise SystemExit("resnorm_ext: compiling failed, and the compilers' messages stand above")
        made = Path(self.build_temp, ninja.LIBRARY)
        if not made.is_file():
            raise SystemExit(
                f"resnorm_ext: compiling left no library: is {' '.join(self.toolchain.compiler)} a compiler?"
            )
        built.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, built)
        library.info_path(built).write_text(json.dumps(library.info(self.toolchain), indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.build_lib, self.get_ext_filename(EXTENSION))
        in_place = Path(self.get_finalized_command("build_py").get_package_dir("resnorm_ext"), built.name)
        shutil.copy(library.info_path(built), library.info_path(in_place))
