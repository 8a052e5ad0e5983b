# SPDX-License-Identifier: BSD-3-Clause
"""What is counted of a kernel, as one lane goes through it: the first one of a block's second warp. The first warp of a
row has more to do than the others; the first lane of a warp goes every way that another one goes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .compilation import Compiled
from .interpreter import CannotInterpret, walk
from .kernels import BackwardKernel, Kernel
from .lane import Lane
from .loads import Wait
from .occupancy import WARP, resident_blocks

ROWS = 32768
ROUNDS = (4, 6)  # of a persistent kernel's loop: what the later ones add is what a round takes


@dataclass(frozen=True)
class Counts:
    """What comes with each row is a backward kernel's in one round of its loop, without what is before and after."""

    instructions: float  # an element: that a warp issues, times its lanes; those whose guard is false count
    registers: int
    spilled_bytes: int
    blocks: int  # on a multiprocessor at once
    warps: int
    kib_in_flight: float  # of rows, on a multiprocessor: the most that is on its way when a lane waits
    parameter_waits: float  # for weights and biases, one after the other: those asked for together wait together
    gpu_fences: float
    l1_flushes: float
    local_accesses: float


def count(kernel: Kernel, compiled: Compiled) -> Counts:
    is_persistent = isinstance(kernel, BackwardKernel)
    lane, totals = totals_of_round(kernel, compiled) if is_persistent else totals_of_row(kernel, compiled)
    elements = totals.pop("result_bytes") / kernel.dtype.itemsize
    check_elements(kernel, elements)
    threads, launch = kernel.plan["threads"], kernel.launch(ROWS)
    blocks = min(launch.most_blocks, resident_blocks(threads, compiled.registers, launch.shared_bytes))
    return Counts(
        instructions=totals.pop("instructions") / elements,
        registers=compiled.registers,
        spilled_bytes=compiled.spilled_bytes,
        blocks=blocks,
        warps=blocks * threads // WARP,
        kib_in_flight=most_in_flight(kernel, lane) * threads * blocks / 1024,
        **totals,
    )


def totals_of_row(kernel: Kernel, compiled: Compiled) -> tuple[Lane, dict[str, float]]:
    lane = walked(kernel, compiled, ROWS)
    return lane, totals_of(kernel, lane)


def totals_of_round(kernel: BackwardKernel, compiled: Compiled) -> tuple[Lane, dict[str, float]]:
    first, last = (walked(kernel, compiled, rounds * kernel.rows_per_round) for rounds in ROUNDS)
    before, after = totals_of(kernel, first), totals_of(kernel, last)
    return last, {name: (after[name] - before[name]) / (ROUNDS[1] - ROUNDS[0]) for name in after}


def walked(kernel: Kernel, compiled: Compiled, rows: int) -> Lane:
    special_registers = {"SR_TID.X": WARP, "SR_CTAID.X": 0, "SR_CgaCtaId": 0, "SR_SWINHI": 0, "SRZ": 0}
    special_registers["SR_CgaSize"] = kernel.plan["cluster"] > 1
    lane = Lane(kernel.constants(rows), special_registers)
    walk(lane, compiled.code)
    if kernel.direction == "forward" and not lane.issued["ACQBULK"]:
        raise CannotInterpret("the kernel does not await the one before, which it may overlap")
    return lane


def totals_of(kernel: Kernel, lane: Lane) -> dict[str, float]:
    stored = ((kernel.tensor_at(address), size) for address, size in lane.stored)
    dependent = (wait for wait in lane.loads.waits if wait.is_dependent)
    awaited = ((wait.step, kernel.tensor_at(load.address)) for wait in dependent for load in wait.loads)
    return {
        "instructions": lane.step,
        "result_bytes": sum(size for tensor, size in stored if tensor == kernel.result),
        "parameter_waits": len({step for step, tensor in awaited if tensor in kernel.parameters}),
        "gpu_fences": issued(lane, r"MEMBAR\..*GPU"),
        "l1_flushes": issued(lane, r"CCTL\.IVALL"),
        "local_accesses": issued(lane, r"(LDL|STL)(\..*)?"),
    }


def issued(lane: Lane, pattern: str) -> int:
    return sum(times for opcode, times in lane.issued.items() if re.fullmatch(pattern, opcode))


def most_in_flight(kernel: Kernel, lane: Lane) -> int:
    """Bytes of rows."""

    def in_flight(wait: Wait) -> int:
        return sum(load.size for load in wait.outstanding if kernel.tensor_at(load.address) in kernel.rows_read)

    return max(in_flight(wait) for wait in lane.loads.waits)


def check_elements(kernel: Kernel, elements: float) -> None:
    """That the lane has stored its share of a row."""
    share = kernel.columns / (kernel.plan["row_threads"] * kernel.plan["cluster"])
    if elements != share:
        raise CannotInterpret(
            f"a lane stores {elements:g} elements of a row, not its share of {share:g}. "
            "Was the extension, whose plan this is, built from these sources?"
        )
