# SPDX-License-Identifier: BSD-3-Clause
"""What is built: version, sources, flags, instruction sets, architectures. setup.py, the JIT and (held to it by a test)
CMakeLists.txt share this description. Standard library only, so that it can be read where torch or the extension is
missing."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

VERSION = "0.1.0"

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries the sources as package data for the JIT; in a checkout they lie beside the package.
IS_CHECKOUT = not (_PACKAGE / "_csrc").is_dir()
CSRC = _PACKAGE.parent / "csrc" if IS_CHECKOUT else _PACKAGE / "_csrc"

CXX_FLAGS = (
    "-std=c++20",
    "-O3",
    "-g0",
    "-DNDEBUG",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
)

# Torch's own OpenMP runtime serves at::parallel_for: -fopenmp is for compiling only, never for linking, because a
# second runtime would bring a second pool of threads. GCC 12 sees an overflow in torch's intrusive_ptr that is none.
TORCH_FLAGS = ("-O2", "-fopenmp", "-Wno-stringop-overflow")

# Compressed, and without line numbers (NVCC_APPEND_FLAGS=-lineinfo adds them), a wheel is a third as large. The last
# two lift what PyTorch forbids its own kernels, which use its half types in place of CUDA's.
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fvisibility=hidden",
    "-Xfatbin=-compress-all",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
)

_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
_AVX512_FLAGS = (
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    *_AVX2_FLAGS,
    "-mprefer-vector-width=512",
)
# The flags that the units of an instruction set have beyond the others: nothing else may contain AVX instructions. In
# an order in which a CPU that has one has those before it.
ISA_FLAGS = {
    "scalar": (),
    "avx2": _AVX2_FLAGS,
    "avx512": _AVX512_FLAGS,
    "avx512_bf16": (*_AVX512_FLAGS, "-mavx512bf16"),
}

# In which nothing but bfloat16 differs from another one: its units hold that alone where both are built.
BASE_ISA = {"avx512_bf16": "avx512"}

# Kernels that are compiled once per instruction set, each family from one source; the slowest to compile first.
FAMILIES = ("norm_backward", "norm_forward", "attention", "attention_backward", "residual_add", "activation", "linear")

# What most units that include torch include, compiled once for all of them.
TORCH_HEADERS = "torch_headers.h"

# One binary per generation whose instructions differ for these kernels: 8.6 and 8.9 run 8.0's, 10.3 runs 10.0's,
# 12.1 runs 12.0's. The newest one's PTX serves what comes after.
CUDA_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")


def is_x86_64() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def all_isas() -> tuple[str, ...]:
    """The instruction sets that this machine's architecture has kernels for."""
    return tuple(ISA_FLAGS) if is_x86_64() else ("scalar",)


def best_isas() -> tuple[str, ...]:
    """Of those the last whose features this CPU has, which is the one that it will run, what runs everywhere, and what
    RESNORM_CPU_ISA asks for."""
    features = cpu_features()
    usable = [isa for isa in all_isas() if features_of(isa) <= features]
    wanted = {"scalar", usable[-1], os.environ.get("RESNORM_CPU_ISA")}
    return tuple(isa for isa in usable if isa in wanted)


def features_of(isa: str) -> set[str]:
    """Names of the CPU features that the kernels of ``isa`` use."""
    return {flag.removeprefix("-m") for flag in ISA_FLAGS[isa] if "=" not in flag}


def cpu_features() -> set[str]:
    """Names of this CPU's features, as compilers spell them."""
    flags = re.search(r"^flags\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {flag.replace("_", "") for flag in flags[1].split()} if flags else set()


@dataclass(frozen=True)
class Unit:
    """What one run of a compiler makes: a source, relative to csrc as all paths here, and the flags it has alone."""

    source: str
    isa: str | None = None
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.source} ({self.isa})" if self.isa else self.source

    @property
    def object(self) -> str:
        return f"{Path(self.source).with_suffix('')}{f'.{self.isa}' if self.isa else ''}.o"


def kernel_units(isas: tuple[str, ...]) -> list[Unit]:
    """The torch-free CPU kernels, for these instruction sets."""
    folder = "kernels/cpu"
    with_isas = tuple(f"-DRESNORM_WITH_{isa.upper()}" for isa in isas if isa != "scalar")
    units = {}
    for source in sorted(_glob(f"{folder}/*.cpp"), key=_weight):
        family = Path(source).stem
        if family not in FAMILIES:
            units[source] = Unit(source, flags=with_isas if family == "dispatch" else ())
            continue
        for isa in isas:
            flags = (*ISA_FLAGS[isa], f"-DRESNORM_ISA={isa}")
            if (base := BASE_ISA.get(isa)) in isas:
                flags += (f"-DRESNORM_BASE={base}",)
            units[source, isa] = Unit(source, isa, flags)
    return list(units.values())


def torch_units(*, cuda: bool) -> list[Unit]:
    """Operators, engine and bindings: everything that includes torch's headers."""
    others = ("kernels/", *(() if cuda else ("ops/cuda/",)))
    return [Unit(source) for source in _glob("**/*.cpp") if not source.startswith(others)]


def cuda_units() -> list[Unit]:
    return [Unit(source) for source in _glob("kernels/cuda/*.cu")]


def source_hash() -> str:
    """Changes when any file under csrc changes."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(CSRC)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def minor_version(version: str) -> str:
    """``"2.13"`` of ``"2.13.0+cpu"``."""
    return ".".join(version.split("+")[0].split(".")[:2])


def local_version(torch: str, cuda: str | None) -> str:
    """What an extension is built for, as a wheel's name says it: ``cpu.torch2.13``, ``cu130.torch2.14``."""
    return f"{'cpu' if cuda is None else 'cu' + cuda.replace('.', '')}.torch{minor_version(torch)}"


def _glob(pattern: str) -> list[str]:
    return sorted(path.relative_to(CSRC).as_posix() for path in CSRC.glob(pattern))


def _weight(source: str) -> int:
    family = Path(source).stem
    return FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
