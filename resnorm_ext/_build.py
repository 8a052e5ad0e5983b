# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the extension with torch.utils.cpp_extension: ``python setup.py build_ext`` in a checkout,
``python -m resnorm_ext._build`` for the JIT."""

from __future__ import annotations

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from torch.utils import cpp_extension

from . import _library, build_config
from ._toolchain import Toolchain, detect, max_jobs

EXTENSION = "resnorm_ext._C"


class BuildExtension(cpp_extension.BuildExtension):
    """PyTorch's, with flags of their own for the kernels of each instruction set (PyTorch's has one list for all C++),
    and with the library's description beside the library."""

    def run(self) -> None:
        self.toolchain = detect()
        # Not before: a source distribution is made without any toolchain, and setuptools keeps notes on this object.
        vars(self.extensions[0]).update(vars(_extension(self.toolchain)))
        if self.editable_mode:  # pip's own folder for objects does not outlast the build
            self.build_temp = "build/editable"
        # A folder for each toolchain, because ninja does not see one change behind the same path.
        self.build_temp = f"{self.build_temp}-{self.toolchain.key[:8]}"
        print(f"resnorm_ext: building {self.toolchain.kernels}", flush=True)
        super().run()

    def build_extension(self, extension: setuptools.Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name))
        _library.info_path(library).unlink(missing_ok=True)
        with ThreadPoolExecutor(max_jobs()) as pool:
            objects = pool.map(self._compile_isa, build_config.isa_sources())
        extension.extra_objects = [path for paths in objects for path in paths]
        super().build_extension(extension)
        _library.info_path(library).write_text(json.dumps(_library.info(self.toolchain), indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.build_lib, self.get_ext_filename(EXTENSION))
        in_place = Path(self.get_finalized_command("build_py").get_package_dir("resnorm_ext"), built.name)
        shutil.copy(_library.info_path(built), _library.info_path(in_place))

    def _compile_isa(self, source: str) -> list[str]:
        return self.compiler.compile(
            [_path(source)],
            output_dir=str(Path(self.build_temp, Path(source).stem)),
            include_dirs=[str(build_config.CSRC)],
            extra_postargs=list(build_config.kernel_flags(source)),
        )


def _extension(toolchain: Toolchain) -> setuptools.Extension:
    """The extension but for the kernels that have flags of their own."""
    toolkit = toolchain.toolkit
    sources = sorted(set(build_config.sources(cuda=toolkit is not None)) - set(build_config.isa_sources()))
    # PyTorch's headers as a system's, which are not warned about.
    headers = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    flags = {"cxx": [*build_config.CXX_FLAGS, *build_config.TORCH_FLAGS, *headers]}
    os.environ.setdefault("MAX_JOBS", str(max_jobs()))  # ninja's own default knows the cores, not the memory
    # PyTorch runs the first ninja on PATH, where pip's need not be.
    os.environ["PATH"] = os.pathsep.join([str(Path(toolchain.ninja).parent), os.environ.get("PATH", "")])
    describe, macros = cpp_extension.CppExtension, []
    if toolkit:
        describe, macros = cpp_extension.CUDAExtension, [("RESNORM_WITH_CUDA", None)]
        flags["nvcc"] = list(build_config.NVCC_FLAGS)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(toolkit.architectures)
        # PyTorch takes the folder above any nvcc on PATH for the toolkit, also above a script that calls another.
        cpp_extension.CUDA_HOME = str(toolkit.home)
    return describe(
        EXTENSION,
        [_path(source) for source in sources],
        include_dirs=[str(build_config.CSRC)],
        define_macros=macros,
        extra_compile_args=flags,
    )


def _path(source: str) -> str:
    """As setuptools wants it in a checkout: relative."""
    path = build_config.CSRC / source
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    setuptools.setup(
        name="resnorm_ext",
        script_args=["build_ext", *sys.argv[1:]],
        ext_modules=[setuptools.Extension(EXTENSION, sources=[])],
        cmdclass={"build_ext": BuildExtension},
    )
