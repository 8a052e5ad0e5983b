# SPDX-License-Identifier: BSD-3-Clause
"""What tells one compiled library from another: its key, and the description that lies beside it."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

from . import config
from .toolchain import Toolchain


def key(toolchain: Toolchain) -> str:
    """Names everything that decides what a library is."""
    how = [Path(__file__).with_name(name).read_bytes() for name in ("config.py", "ninja.py")]
    names = ("CC", "CFLAGS", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    flags = {name: os.environ.get(name) for name in names}
    return hashlib.sha256(repr((config.source_hash(), how, flags, toolchain, python_abi())).encode()).hexdigest()


def info(toolchain: Toolchain) -> dict[str, object]:
    """What a library was built for and with: read before it is loaded, because a wrong one can crash the process."""
    toolkit = toolchain.toolkit
    return {
        "version": config.VERSION,
        "built_for": toolchain.local_version,
        "torch": toolchain.torch,
        "torch_cuda": toolchain.torch_cuda,
        "cuda": toolchain.cuda,
        "cuda_reason": toolchain.cuda_reason,
        "cuda_architectures": list(toolkit.architectures) if toolkit else [],
        "python": python_abi(),
        "compiler": toolchain.compiler_version,
        "cxx_flags": list(config.CXX_FLAGS),
        "isa_flags": {isa: list(config.ISA_FLAGS[isa]) for isa in toolchain.isas},
        "nvcc_flags": list(config.NVCC_FLAGS) if toolkit else [],
        "sources": config.source_hash(),
    }


def info_path(library: Path) -> Path:
    return library.with_suffix(".json")


def python_abi() -> str:
    """Which Pythons can load a library that was compiled for this one."""
    return sysconfig.get_config_var("SOABI")
