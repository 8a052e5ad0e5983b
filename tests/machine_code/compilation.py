# SPDX-License-Identifier: BSD-3-Clause
"""From kernels to machine code: with what the compiler says of registers and spills."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from resnorm_ext.build import config, toolchain

from .arguments import NormBackwardArguments, NormForwardArguments
from .kernels import KERNELS, Kernel
from .sass import Instruction, disassemble

ROOT = config.CSRC.parent  # of the sources
DISASSEMBLER_PACKAGE = "nvidia-cuda-nvdisasm"

ELEMENT_NAMES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16"}
MANGLED_TYPES = {torch.float32: "fff", torch.bfloat16: "13__nv_bfloat16S3_S3_"}


@dataclass(frozen=True)
class Compiled:
    code: Sequence[Instruction]
    registers: int
    spilled_bytes: int


def compile_kernels(architecture: int, toolkit: Path, folder: Path, root: Path = ROOT) -> dict[Kernel, Compiled]:
    """From the sources below ``root``, by way of files in ``folder``. The plans are those of the built extension."""
    kernels = KERNELS[architecture]
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    source.write_text(source_of(kernels))
    flags = [flag for flag in config.NVCC_FLAGS if not flag.startswith("-Xcompiler")]
    target = [f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v", f"-I{root}", "-o", cubin]
    run = subprocess.run([toolkit / "bin" / "nvcc", *flags, *target, source], capture_output=True, text=True)
    if run.returncode != 0:
        raise toolchain.BuildError(f"nvcc failed:\n{run.stderr}")
    codes, reports = disassemble(find_disassembler(toolkit), cubin), reports_of(run.stderr)
    names = {kernel: mangled_name(kernel, codes) for kernel in kernels}
    return {kernel: Compiled(codes[name], *reports[name]) for kernel, name in names.items()}


def source_of(kernels: Iterable[Kernel]) -> str:
    instances = sorted({declaration_of(kernel) for kernel in kernels})
    checks = [check for structure in (NormForwardArguments, NormBackwardArguments) for check in checks_of(structure)]
    headers = [
        f'#include "csrc/kernels/cuda/{name}.cuh"' for name in ("element_types", "norm_forward", "norm_backward")
    ]
    return "\n".join(["#include <cstddef>", *headers, "using namespace resnorm::cuda;", *checks, *instances, ""])


def declaration_of(kernel: Kernel) -> str:
    arguments = ", ".join(str(argument).lower() for argument in kernel.template_arguments)
    types = f"SameTypes<{ELEMENT_NAMES[kernel.dtype]}>"
    structure = kernel.arguments_type.__name__
    return f"template __global__ void resnorm::cuda::{kernel.function}<{types}, {arguments}>(const {structure});"


def checks_of(structure: type[ctypes.Structure]) -> list[str]:
    """That the C++ structure is laid out like this one."""
    name = structure.__name__
    offsets = {field: getattr(structure, field).offset for field, _ in structure._fields_}
    return [
        f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});",
        *(f"static_assert(offsetof({name}, {field}) == {offset});" for field, offset in offsets.items()),
    ]


def mangled_name(kernel: Kernel, names: Iterable[str]) -> str:
    arguments = "".join(f"L{'b' if isinstance(value, bool) else 'i'}{value:d}E" for value in kernel.template_arguments)
    part = f"{kernel.function}INS0_12ElementTypesI{MANGLED_TYPES[kernel.dtype]}EE{arguments}EEv"
    (name,) = (name for name in names if part in name)
    return name


def reports_of(ptxas: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of every kernel by its mangled name."""
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return {name: (int(registers), int(spilled)) for name, spilled, registers in re.findall(pattern, ptxas, re.DOTALL)}


def find_disassembler(toolkit: Path) -> Path:
    """The package's; else the toolkit's, which not every installation has."""
    candidates = [toolkit / "bin" / "nvdisasm"]
    try:
        files = importlib.metadata.files(DISASSEMBLER_PACKAGE) or []
        candidates = [Path(file.locate()) for file in files if file.name == "nvdisasm"] + candidates
    except importlib.metadata.PackageNotFoundError:
        pass
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no nvdisasm; looked at {candidates[-1]}. Type: pip install {DISASSEMBLER_PACKAGE}")
