# SPDX-License-Identifier: BSD-3-Clause
"""What the machine code of sm_90 and sm_100 has a GPU do for an element, and how many it has under way: a change of the
kernels that costs more fails here. From tests/, ``python -m machine_code`` prints it all. Needs nvcc, no GPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from resnorm_ext.build import toolchain

from .compilation import Compiled, compile_kernels
from .counts import count
from .kernels import KERNELS, Kernel

pytestmark = pytest.mark.cuda_compile


class Bounds(NamedTuple):
    """Of what counts.Counts calls the same."""

    instructions: float
    registers: int
    warps: int
    kib_in_flight: int
    parameter_waits: int
    gpu_fences: int
    l1_flushes: int
    spilled_bytes: int = 0
    local_accesses: int = 0


AT_LEAST = ("warps", "kib_in_flight")  # at most: all others

# The one flush of a cluster on sm_90 is that of the barrier at its start, which acquires.
# fmt: off
BOUNDS = {
    90: {
        #                                            instructions registers warps  KiB in flight  waits  fences  flushes
        "forward bfloat16 768":                Bounds(18.5,           64,      32,       48,         2,      0,      0),
        "forward bfloat16 1024":               Bounds(17.0,           64,      32,       64,         2,      0,      0),
        "forward bfloat16 4096":               Bounds(20.0,           64,      32,       64,         2,      0,      0),
        "forward bfloat16 16384":              Bounds(20.0,           64,      32,       64,         2,      0,      0),
        "forward bfloat16 65536":              Bounds(22.5,           64,      32,       64,         2,      0,      1),
        "forward float32 4096":                Bounds(25.5,           64,      32,       64,         2,      0,      0),
        "forward float32 16384":               Bounds(28.5,           64,      32,       64,         2,      0,      1),
        "forward bfloat16 4096, add":          Bounds(26.0,           64,      32,      128,         2,      0,      0),
        "forward bfloat16 4096, add, dropout": Bounds(40.0,           64,      32,      128,         2,      0,      0),
        "backward bfloat16 1024":              Bounds(33.0,          128,      16,       64,         1,      0,      0),
        "backward bfloat16 16384":             Bounds(36.0,          128,      16,       64,         1,      0,      0),
        "backward float32 4096":               Bounds(35.5,          128,      16,      128,         1,      0,      0),
        "backward float32 16384":              Bounds(40.5,          128,      16,      128,         1,      0,      0),
    },
    100: {
        "forward bfloat16 768":                Bounds(15.0,           64,      32,       48,         2,      0,      0),
        "forward bfloat16 1024":               Bounds(13.5,           64,      32,       64,         3,      0,      0),
        "forward bfloat16 4096":               Bounds(15.5,           64,      32,       64,         2,      0,      0),
        "forward bfloat16 16384":              Bounds(15.5,           64,      32,       64,         2,      0,      0),
        "forward bfloat16 65536":              Bounds(19.5,           64,      32,       64,         2,      0,      0),
        "forward float32 4096":                Bounds(18.5,           64,      32,       64,         2,      0,      0),
        "forward float32 16384":               Bounds(23.0,           64,      32,       64,         2,      0,      0),
        "forward bfloat16 4096, add":          Bounds(24.5,           64,      32,       64,         1,      0,      0),
        "forward bfloat16 4096, add, dropout": Bounds(39.5,           64,      32,       48,         1,      0,      0),
        "backward bfloat16 1024":              Bounds(29.5,          128,      16,       64,         1,      0,      0),
        "backward bfloat16 16384":             Bounds(31.5,          128,      16,       64,         1,      0,      0),
        "backward float32 4096":               Bounds(35.0,          128,      16,      128,         1,      0,      0),
        "backward float32 16384":              Bounds(36.5,          128,      16,      128,         1,      0,      0),
    },
}
# fmt: on


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Kernel, Compiled]:
    toolkit, reason = toolchain.find_toolkit()
    if toolkit is None:
        pytest.skip(reason)
    folders = {architecture: tmp_path_factory.mktemp(f"sm_{architecture}") for architecture in KERNELS}
    return {
        kernel: code
        for architecture, folder in folders.items()
        for kernel, code in compile_kernels(architecture, toolkit, folder).items()
    }


@pytest.mark.parametrize(
    "kernel",
    [kernel for kernels in KERNELS.values() for kernel in kernels],
    ids=lambda kernel: f"{kernel.name} on sm_{kernel.architecture}",
)
def test_counts_are_within_bounds(kernel: Kernel, compiled: dict[Kernel, Compiled]):
    counts, outside = count(kernel, compiled[kernel]), {}
    for name, bound in BOUNDS[kernel.architecture][kernel.name]._asdict().items():
        got = getattr(counts, name)
        is_within = got >= bound if name in AT_LEAST else got <= bound
        if not is_within:
            outside[name] = f"expected at {'least' if name in AT_LEAST else 'most'} {bound:g}, got {got:.4g}"
    assert not outside, kernel.name
