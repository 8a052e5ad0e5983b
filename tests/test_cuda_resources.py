# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA compiler makes of the kernels, on every architecture that a wheel has or TORCH_CUDA_ARCH_LIST names:
nothing spilled to memory, and registers few enough for the threads that plans put on a multiprocessor. Needs nvcc, no
GPU."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from resnorm_ext.build import config, toolchain

pytestmark = pytest.mark.cuda_compile


class Resources(NamedTuple):
    kernel: str
    registers: int
    stack: int
    spilled: int


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory):
    toolkit, reason = toolchain.find_toolkit()
    if toolkit is None:
        pytest.skip(reason)
    return toolkit / "bin" / "nvcc"


@pytest.fixture(scope="module")
def resources(nvcc, tmp_path_factory) -> dict[tuple[str, str], list[Resources]]:
    """Of every kernel, by source and architecture."""
    folder = tmp_path_factory.mktemp("cubins")
    architectures = toolchain.cuda_architectures(config.CUDA_ARCHITECTURES, [*config.CUDA_ARCHITECTURES])
    units = [(unit.source, arch.removesuffix("+PTX")) for unit in config.cuda_units() for arch in architectures]

    def compile_unit(unit: tuple[str, str]) -> list[Resources]:
        source, architecture = unit
        number = architecture.replace(".", "")
        flags = [flag for flag in config.NVCC_FLAGS if not flag.startswith("-Xcompiler")]
        target = [f"-arch=sm_{number}", "-cubin", "-Xptxas=-v", "-o", folder / f"{source.replace('/', '-')}.{number}"]
        command = [nvcc, *flags, *target, config.CSRC / source]
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

    with ThreadPoolExecutor(toolchain.max_jobs()) as pool:
        return dict(zip(units, pool.map(compile_unit, units), strict=True))


def test_nothing_spills(resources):
    spilling = {
        unit: [kernel for kernel in kernels if kernel.spilled or kernel.stack] for unit, kernels in resources.items()
    }
    assert not {unit: kernels for unit, kernels in spilling.items() if kernels}


def test_registers_leave_room_for_the_threads_of_a_plan(resources):
    """Of 65536: 64 for 1024 threads of a forward kernel, 128 for 512 of others, 168 for 384 of a backward kernel whose
    rows start anywhere. What is launched for any rows, element by element, has blocks of 256."""
    limits = {"norm_forward.cu": 255, "norm_backward.cu": 255, "norm_forward_": 64, "norm_backward_": 168, "": 128}
    for (source, _), kernels in resources.items():
        limit = next(registers for part, registers in limits.items() if part in source)
        assert kernels and max(kernel.registers for kernel in kernels) <= limit, source
