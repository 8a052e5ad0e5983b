# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA compiler makes of the kernels, on every architecture that a wheel has: nothing spilled to memory, and
registers few enough for the threads that plans put on a multiprocessor. Needs nvcc, no GPU."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from resnorm_ext import _toolchain, build_config


class Resources(NamedTuple):
    kernel: str
    registers: int
    stack: int
    spilled: int


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory):
    toolkit, reason = _toolchain.find_toolkit()
    if toolkit is None:
        pytest.skip(reason)
    return toolkit / "bin" / "nvcc"


@pytest.fixture(scope="module")
def resources(nvcc, tmp_path_factory) -> dict[tuple[str, str], list[Resources]]:
    """Of every kernel, by source and architecture."""
    folder = tmp_path_factory.mktemp("cubins")
    units = [(source, arch) for source in build_config.cuda_sources() for arch in build_config.CUDA_ARCHITECTURES]

    def compile_unit(unit: tuple[str, str]) -> list[Resources]:
        source, architecture = unit
        number = architecture.replace(".", "")
        flags = [flag for flag in build_config.NVCC_FLAGS if not flag.startswith("-Xcompiler")]
        target = [f"-arch=sm_{number}", "-cubin", "-Xptxas=-v", "-o", folder / f"{source.replace('/', '-')}.{number}"]
        command = [nvcc, *flags, *target, build_config.CSRC / source]
        report = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        pattern = (
            r"Compiling entry function '(\w+)'"
            r".*?(\d+) bytes stack frame, (\d+) bytes spill stores"
            r".*?Used (\d+) registers"
        )
        return [
            Resources(kernel, int(registers), int(stack), int(spilled))
            for kernel, stack, spilled, registers in re.findall(pattern, report, re.DOTALL)
        ]

    with ThreadPoolExecutor(_toolchain.max_jobs()) as pool:
        return dict(zip(units, pool.map(compile_unit, units), strict=True))


def test_nothing_spills(resources):
    spilling = {
        unit: [kernel for kernel in kernels if kernel.spilled or kernel.stack] for unit, kernels in resources.items()
    }
    assert not {unit: kernels for unit, kernels in spilling.items() if kernels}


def test_registers_leave_room_for_the_threads_of_a_plan(resources):
    """64 for 1024 threads of the forward kernels, 128 for 512 of the backward ones, of 65536."""
    for (source, _), kernels in resources.items():
        limit = (
            64
            if "norm_forward_" in source
            else 255
            if source.endswith(("norm_forward.cu", "norm_backward.cu"))
            else 128
        )
        assert kernels and max(kernel.registers for kernel in kernels) <= limit, source
