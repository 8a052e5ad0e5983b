# SPDX-License-Identifier: BSD-3-Clause
"""What is built: version, sources, flags, architectures. setup.py, jit.py and (held to it by a test) CMakeLists.txt
share this description. Standard library only, so that it can be read where torch or the extension is missing."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

VERSION = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the sources as package data for the JIT; in a checkout they lie beside the package.
CSRC = _PACKAGE / "_csrc" if (_PACKAGE / "_csrc").is_dir() else _PACKAGE.parent / "csrc"

# -g0 because setuptools puts Python's own flags first, often with -g: twice the time, ten times the size.
CXX_FLAGS = ("-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra")

# Torch's own OpenMP runtime serves at::parallel_for: -fopenmp is for compiling only, never for linking, because a
# second runtime would bring a second pool of threads. GCC 12 sees an overflow in torch's intrusive_ptr that is none.
TORCH_FLAGS = ("-fopenmp", "-Wno-stringop-overflow")

# The last two lift what PyTorch forbids its own kernels, which use its half types in place of CUDA's.
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fvisibility=hidden",
    "-lineinfo",
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
# The flags that one translation unit has beyond the others: nothing else may contain AVX instructions.
ISA_FLAGS = {
    "kernels/cpu/isa_scalar.cpp": (),
    "kernels/cpu/isa_avx2.cpp": _AVX2_FLAGS,
    "kernels/cpu/isa_avx512.cpp": _AVX512_FLAGS,
    "kernels/cpu/isa_avx512_bf16.cpp": (*_AVX512_FLAGS, "-mavx512bf16"),
}

# One binary per generation whose instructions differ for these kernels: 8.6 and 8.9 run 8.0's, 10.3 runs 10.0's,
# 12.1 runs 12.0's. The newest one's PTX serves what comes after.
CUDA_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")


def is_x86_64() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def kernel_sources() -> list[str]:
    """The torch-free CPU kernels of this machine's architecture, relative to csrc, as all paths here."""
    sources = _glob("kernels/cpu/*.cpp")
    return sources if is_x86_64() else [s for s in sources if not ISA_FLAGS.get(s)]


def isa_sources() -> list[str]:
    """Those of the kernel sources that have flags of their own."""
    return [source for source in kernel_sources() if ISA_FLAGS.get(source)]


def torch_sources(*, cuda: bool) -> list[str]:
    """Operators, engine and bindings: everything that includes torch's headers."""
    folders = (".", "engine", "ops", "ops/support", "ops/cpu", *(("ops/cuda",) if cuda else ()))
    return [source for folder in folders for source in _glob(f"{folder}/*.cpp")]


def cuda_sources() -> list[str]:
    return _glob("kernels/cuda/*.cu")


def sources(*, cuda: bool) -> list[str]:
    return [*kernel_sources(), *torch_sources(cuda=cuda), *(cuda_sources() if cuda else ())]


def kernel_flags(source: str) -> tuple[str, ...]:
    return (*CXX_FLAGS, *ISA_FLAGS.get(source, ()))


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
