# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the extension: writes the ninja file, runs it, publishes the result.

Why not torch.utils.cpp_extension: it has one list of flags per language, and here each instruction set's translation
unit has its own; and ahead-of-time and JIT builds are to be the same graph. Writing it takes fewer lines than bending
that one. Compilers are run by ninja in parallel, and only for what changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

from . import build_config
from ._toolchain import BuildError, Toolchain, architecture_flags, max_jobs

Progress = Callable[[int, int, str], None]  # (finished, total, one line of ninja's)

_RULES = """\
ninja_required_version = 1.5
rule cxx
  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $name
rule nvcc
  command = {nvcc} -MD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $name
rule link
  command = {compiler} -shared $in -o $out $flags
  description = $name
"""


def ninja_file(toolchain: Toolchain) -> str:
    """The build graph; object files and the library ``_C.so`` are relative to the folder it is run in."""
    toolkit = toolchain.toolkit
    csrc = (f"-I{build_config.CSRC}",)
    torch = (*build_config.CXX_FLAGS, *build_config.TORCH_FLAGS, *csrc)
    torch += tuple(f"-isystem{path}" for path in toolchain.torch_include)
    libraries = ["-Wl,--as-needed", *(f"-L{path}" for path in toolchain.torch_libraries)]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    units = [("cxx", source, (*build_config.kernel_flags(source), *csrc)) for source in build_config.kernel_sources()]
    if toolkit:
        torch += ("-DRESNORM_WITH_CUDA", f"-isystem{toolkit.home / 'include'}")
        libraries += ["-lc10_cuda", "-ltorch_cuda", f"-L{toolkit.libraries}", "-lcudart"]
        nvcc = (*build_config.NVCC_FLAGS, *architecture_flags(toolkit.architectures), *csrc)
        units += [("nvcc", source, nvcc) for source in build_config.cuda_sources()]
    units += [("cxx", source, torch) for source in build_config.torch_sources(cuda=toolkit is not None)]

    nvcc_command = (str(toolkit.nvcc), "-ccbin", toolchain.host_compiler) if toolkit else ()
    lines = [_RULES.format(compiler=_shell(toolchain.compiler), nvcc=_shell(nvcc_command))]
    objects = []
    for rule, source, flags in units:
        objects.append(source + ".o")
        lines.append(f"build {source}.o: {rule} {_path(build_config.CSRC / source)}")
        lines.append(f"  flags = {_shell(flags)}\n  name = {source}")
    lines.append(f"build _C.so: link {' '.join(objects)}\n  flags = {_shell(libraries)}\n  name = _C.so\n")
    return "\n".join(lines)


def toolchain_key(toolchain: Toolchain) -> str:
    """Names what ninja does not see change: torch's headers and the compilers, behind paths that stay the same."""
    tools = (toolchain.torch, toolchain.compiler, toolchain.compiler_version, toolchain.cuda, python_abi())
    return hashlib.sha256(repr(tools).encode()).hexdigest()


def library_key(toolchain: Toolchain) -> str:
    """Names everything that decides what the library is."""
    identity = (ninja_file(toolchain), toolchain_key(toolchain), build_config.source_hash())
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def build(toolchain: Toolchain, directory: Path, output: Path, progress: Progress, *, verbose: bool = False) -> None:
    """Brings ``directory`` up to date and copies the library to ``output``, its description (build_info) beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    text = ninja_file(toolchain)
    if not (directory / "build.ninja").exists() or (directory / "build.ninja").read_text() != text:
        (directory / "build.ninja").write_text(text)
    info = build_info(toolchain)
    _run(toolchain.ninja, directory, progress, verbose)
    output.parent.mkdir(parents=True, exist_ok=True)
    info_path(output).unlink(missing_ok=True)
    _replace(output, lambda path: shutil.copy(directory / "_C.so", path))
    _replace(info_path(output), lambda path: path.write_text(json.dumps(info, indent=2) + "\n"))


def build_info(toolchain: Toolchain) -> dict[str, object]:
    """What a library was built for and with: read before it is loaded, because a wrong one can crash the process."""
    toolkit = toolchain.toolkit
    return {
        "version": build_config.VERSION,
        "built_for": toolchain.local_version,
        "torch": toolchain.torch,
        "torch_cuda": toolchain.torch_cuda,
        "cuda": toolchain.cuda,
        "cuda_reason": toolchain.cuda_reason,
        "cuda_architectures": list(toolkit.architectures) if toolkit else [],
        "python": python_abi(),
        "compiler": toolchain.compiler_version,
        "cxx_flags": list(build_config.CXX_FLAGS),
        "isa_flags": {Path(source).stem.removeprefix("isa_"): list(f) for source, f in build_config.ISA_FLAGS.items()},
        "nvcc_flags": list(build_config.NVCC_FLAGS) if toolkit else [],
        "sources": build_config.source_hash(),
    }


def info_path(library: Path) -> Path:
    return library.with_suffix(".json")


def python_abi() -> str:
    return sysconfig.get_config_var("SOABI")


def _run(ninja: str, directory: Path, progress: Progress, verbose: bool) -> None:
    command = [ninja, "-C", str(directory), "-j", str(max_jobs()), *(["-v"] if verbose else [])]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    output = []
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with process:
        try:
            for line in process.stdout:
                output.append(line)
                status = re.match(r"\[(\d+)/(\d+)\] ", line)
                progress(*(map(int, status.groups()) if status else (0, 0)), line.rstrip())
        except BaseException:
            process.terminate()  # ninja then stops its compilers and removes what they had half written
            raise
    if process.returncode != 0:
        raise BuildError(f"compiling resnorm_ext failed: {shlex.join(command)}\n{''.join(output)}")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file that others see whole or not at all, also while they have the old one open."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _shell(arguments: list[str] | tuple[str, ...]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))
