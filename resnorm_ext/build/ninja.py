# SPDX-License-Identifier: BSD-3-Clause
"""Says to ninja what makes the library: for each unit a compiler's command, and the files it is made of, which ninja
learns from the compilers. So whoever builds in a folder that has been built in compiles what has changed."""

from __future__ import annotations

import os
import shlex
import sysconfig
from pathlib import Path

from . import config
from .config import Unit
from .toolchain import Toolchain, max_jobs

LIBRARY = "extension.so"

_PRECOMPILED = f"{config.TORCH_HEADERS}.gch"
_RULES = """\
rule cxx
  command = {cxx} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $unit
rule headers
  command = {cxx} $flags -MD -MF $out.d -x c++-header $in -o $out
  depfile = $out.d
  deps = gcc
  description = $unit, for all that include torch
rule nvcc
  command = {nvcc} $flags --generate-dependencies-with-compile --dependency-output $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $unit
rule link
  command = {cxx} -shared $in -o $out $flags
  description = linking
"""


def write(toolchain: Toolchain, folder: Path) -> None:
    """Writes the description of a build in ``folder``, which makes ``folder / LIBRARY``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_description(toolchain))


def command(toolchain: Toolchain, *, verbose: bool = False) -> list[str]:
    """Runs the build in whose folder it is started, a line ``[finished/all] what`` for each unit; ``verbose`` shows the
    compilers' commands."""
    return [toolchain.ninja, f"-j{max_jobs()}", *(["-v"] if verbose else [])]


def environment() -> dict[str, str]:
    return os.environ | {"NINJA_STATUS": "[%f/%t] "}


def _description(toolchain: Toolchain) -> str:
    extension = _torch_extension(toolchain)
    cuda = toolchain.toolkit is not None
    nvcc = str(toolchain.toolkit.nvcc) if cuda else "nvcc"
    own = [name for variable in ("CPPFLAGS", "CFLAGS", "CXXFLAGS") for name in _environment_flags(variable)]
    csrc = f"-I{config.CSRC}"
    kernel_flags = [*config.CXX_FLAGS, csrc]
    # PyTorch's headers as a system's, which are not warned about.
    headers = [f"-isystem{path}" for path in (*extension.include_dirs, sysconfig.get_path("include"))]
    macros = ["-DTORCH_EXTENSION_NAME=_C", *(["-DRESNORM_WITH_CUDA"] if cuda else [])]
    torch_flags = [*config.CXX_FLAGS, *config.TORCH_FLAGS, *macros, "-I.", csrc, *headers]

    text = [_RULES.format(cxx=_quoted(*toolchain.compiler), nvcc=_quoted(nvcc))]
    objects = []

    def build(rule: str, unit: Unit, flags: list[str], output: str = "", needs: str = "") -> None:
        text.append(f"build {_path(output or unit.object)}: {rule} {_path(config.CSRC / unit.source)}{needs}")
        text.append(f"  flags = {_quoted(*flags, *unit.flags)}\n  unit = {unit.name}")
        if not output:
            objects.append(unit.object)

    build("headers", Unit(config.TORCH_HEADERS), [*torch_flags, *own], output=_PRECOMPILED)
    for unit in config.kernel_units(toolchain.isas):
        build("cxx", unit, [*kernel_flags, *own])
    for unit in config.cuda_units() if cuda else ():
        build("nvcc", unit, [*_nvcc_flags(), csrc])
    for unit in config.torch_units(cuda=cuda):
        flags = [*torch_flags, *own, "-include", config.TORCH_HEADERS, "-Winvalid-pch"]
        build("cxx", unit, flags, needs=f" | {_PRECOMPILED}")
    folders = [*extension.library_dirs, *([str(toolchain.toolkit.libraries)] if cuda else [])]
    names = {name: f"-l{name}" for name in extension.libraries}
    if cuda:
        names["cudart"] = toolchain.toolkit.runtime
    libraries = [*(f"-L{folder}" for folder in dict.fromkeys(folders)), *names.values()]
    text.append(f"build {LIBRARY}: link {' '.join(map(_path, objects))}")
    text.append(f"  flags = {_quoted(*_environment_flags('LDFLAGS'), *libraries)}\n")
    return "\n".join(text)


def _torch_extension(toolchain: Toolchain):
    """PyTorch's own description of an extension: where its headers and libraries are, and which to link."""
    from torch.utils import cpp_extension  # imports setuptools, which changes the process that it is imported in

    cpp_extension.get_compiler_abi_compatibility_and_version(toolchain.compiler[0])  # warns where they differ
    if toolchain.toolkit is None:
        return cpp_extension.CppExtension("_C", [])
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(toolchain.toolkit.architectures)
    # PyTorch takes the folder above any nvcc on PATH for the toolkit, also above a script that calls another.
    cpp_extension.CUDA_HOME = str(toolchain.toolkit.home)
    return cpp_extension.CUDAExtension("_C", [])


def _nvcc_flags() -> list[str]:
    """PyTorch's own for its extensions, which read the architectures from TORCH_CUDA_ARCH_LIST, and this project's."""
    from torch.utils import cpp_extension

    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
    flags = [*cpp_extension.COMMON_NVCC_FLAGS, "--compiler-options", "-fPIC", *config.NVCC_FLAGS]
    return [*flags, *cpp_extension._get_cuda_arch_flags(), *host]


def _environment_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def _quoted(*words: str) -> str:
    """For a command: quoted for the shell, then for ninja."""
    return shlex.join(words).replace("$", "$$")


def _path(path: Path | str) -> str:
    """For a list of files."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
