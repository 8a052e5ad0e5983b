# SPDX-License-Identifier: BSD-3-Clause
"""The kernels whose machine code is counted: the instances that the planner chooses, and how they are launched."""

from __future__ import annotations

import ctypes
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch

from resnorm_ext.build.extension import extension

from .arguments import NormBackwardArguments, NormForwardArguments, tensor_at, with_tensors
from .lane import ConstantBank
from .occupancy import WARP

MULTIPROCESSORS = 132
VECTOR_BYTES = 16


class Constants(NamedTuple):
    """Addresses in constant memory."""

    block: int  # its threads
    grid: int  # its blocks
    cluster: int  # its blocks
    has_clusters: int  # whether launched as clusters; on sm_100 how many blocks those have, again
    stack: int
    global_memory: int
    arguments: int


CONSTANTS = {
    90: Constants(
        block=0x0, grid=0xC, cluster=0x188, has_clusters=0x140, stack=0x28, global_memory=0x208, arguments=0x210
    ),
    100: Constants(
        block=0x360, grid=0x370, cluster=0x36C, has_clusters=0x22C, stack=0x37C, global_memory=0x358, arguments=0x380
    ),
}


@dataclass(frozen=True)
class Launch:
    blocks: int
    most_blocks: int  # on a multiprocessor: there are no more
    shared_bytes: int


@dataclass(frozen=True)
class Kernel(ABC):
    """layer_norm with weight and bias on rows that fill what a plan gives them."""

    columns: int
    dtype: torch.dtype
    adds: bool = False  # a residual, and the sum is stored
    drops: bool = False
    architecture: int = 90

    direction: ClassVar[str]
    arguments_type: ClassVar[type[ctypes.Structure]]
    rows_read: ClassVar[tuple[str, ...]]  # tensors of which every element is read once
    result: ClassVar[str]  # one that is written once
    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias", "input_bias")

    @property
    def name(self) -> str:
        options = [text for text, chosen in (("add", self.adds), ("dropout", self.drops)) if chosen]
        return ", ".join([f"{self.direction} {str(self.dtype).removeprefix('torch.')} {self.columns}", *options])

    @property
    def function(self) -> str:
        return f"norm_{self.direction}"

    @cached_property
    def plan(self) -> dict:
        options = {"residual_dtype": self.dtype if self.adds else None, "dropout": self.drops}
        plan = extension.kernel_plan(self.function, self.columns, self.dtype, architecture=self.architecture, **options)
        if plan["generic"] or plan["shifted"]:
            raise ValueError(f"{self.name}: {plan['description']} is not a plan whose kernel is counted here")
        return plan

    @property
    def vector(self) -> int:
        return VECTOR_BYTES // self.dtype.itemsize

    @property
    def warps(self) -> int:
        return self.plan["threads"] // WARP

    @property
    def groups(self) -> int:
        return self.plan["threads"] // self.plan["row_threads"]

    @property
    def barrier_bytes(self) -> int:
        """Of shared memory, as plan.h counts them."""
        return 16 if self.plan["cluster"] > 1 else 0

    def tensor_at(self, address: int) -> str:
        return tensor_at(self.arguments_type, address)

    @property
    @abstractmethod
    def template_arguments(self) -> tuple[int | bool, ...]:
        """After the types."""

    @abstractmethod
    def launch(self, rows: int) -> Launch: ...

    @abstractmethod
    def arguments(self, rows: int) -> ctypes.Structure: ...

    def constants(self, rows: int) -> ConstantBank:
        """Where the hardware and the compiler of the architecture expect them."""
        place, cluster = CONSTANTS[self.architecture], self.plan["cluster"]
        return ConstantBank(
            {
                place.block: struct.pack("<3I", self.plan["threads"], 1, 1),
                place.grid: struct.pack("<3I", self.launch(rows).blocks, 1, 1),
                place.cluster: struct.pack("<I", cluster),
                place.has_clusters: struct.pack("<I", cluster if self.architecture >= 100 else cluster > 1),
                place.stack: struct.pack("<I", 1 << 24),
                place.global_memory: struct.pack("<Q", 0),
                place.arguments: bytes(self.arguments(rows)),
            }
        )


@dataclass(frozen=True)
class ForwardKernel(Kernel):
    direction = "forward"
    arguments_type = NormForwardArguments
    rows_read = ("input", "residual")
    result = "output"

    @property
    def template_arguments(self) -> tuple[int | bool, ...]:
        """Vector, lanes, items, cluster, shifted, centered, adds, drops, most threads: as norm_forward_dispatch.cuh
        chooses them."""
        items, row_threads = self.plan["vectors_per_thread"], self.plan["row_threads"]
        lanes, most_threads = (row_threads, 128) if row_threads <= WARP else (0, 2048 // items)
        return self.vector, lanes, items, self.plan["cluster"] > 1, False, True, self.adds, self.drops, most_threads

    def launch(self, rows: int) -> Launch:
        blocks = -(-rows // self.groups) * self.plan["cluster"]
        slots = 3 * self.warps * self.plan["cluster"] if self.groups == 1 else 0
        return Launch(blocks, -(-blocks // MULTIPROCESSORS), self.barrier_bytes + slots * 4)

    def arguments(self, rows: int) -> ctypes.Structure:
        adds, drops = "residual sum" if self.adds else "", "seed" if self.drops else ""
        strides = dict.fromkeys(("input_stride", "residual_stride", "output_stride", "sum_stride"), self.columns)
        return with_tensors(
            NormForwardArguments,
            f"input weight bias output mean rstd {adds} {drops}",
            rows=rows,
            cols=self.columns,
            reciprocal_cols=1 / self.columns,
            eps=1e-5,
            threshold=6554 if self.drops else 0,
            scale=1.1 if self.drops else 1.0,
            **strides,
        )


@dataclass(frozen=True)
class BackwardKernel(Kernel):
    direction = "backward"
    arguments_type = NormBackwardArguments
    rows_read = ("x", "grad_output", "grad_sum")
    result = "grad_input"

    @property
    def template_arguments(self) -> tuple[int | bool, ...]:
        """Vector, whether a row is a warp's, items, cluster, shifted, centered, adds, drops, input bias: as
        norm_backward_dispatch.cuh chooses them."""
        items, is_warp_row = self.plan["vectors_per_thread"], self.plan["row_threads"] <= WARP
        return self.vector, is_warp_row, items, self.plan["cluster"] > 1, False, True, self.adds, self.drops, False

    @property
    def rows_per_round(self) -> int:
        """Of the loop that persistent blocks go through: one of each group of each block or cluster."""
        return MULTIPROCESSORS // self.plan["cluster"] * (1 if self.plan["cluster"] > 1 else self.groups)

    def launch(self, rows: int) -> Launch:
        cluster = self.plan["cluster"]
        sums = 4 if cluster > 1 else 3  # one vector, so that one asynchronous store sends them
        slots = self.groups * 2 * sums * self.plan["row_threads"] // WARP * cluster
        return Launch(MULTIPROCESSORS // cluster * cluster, 1, self.staged_bytes + self.barrier_bytes + slots * 4)

    @property
    def stage_bytes(self) -> int:
        """Of shared memory, as plan.h counts them."""
        matrices = 3 if self.adds else 2
        return self.plan["vectors_per_thread"] * VECTOR_BYTES * self.plan["threads"] * matrices

    @property
    def staged_bytes(self) -> int:
        exchange = self.groups * (self.plan["row_threads"] + WARP // self.vector) * self.vector * 4
        return max(2 * self.stage_bytes, exchange)

    def arguments(self, rows: int) -> ctypes.Structure:
        adds, drops = "grad_sum grad_residual" if self.adds else "", "seed" if self.drops else ""
        strides = ("x_stride", "grad_output_stride", "grad_sum_stride", "grad_input_stride", "grad_residual_stride")
        return with_tensors(
            NormBackwardArguments,
            f"x grad_output weight mean rstd grad_input partials {adds} {drops}",
            rows=rows,
            cols=self.columns,
            row_threads=self.plan["row_threads"],
            stage_bytes=self.stage_bytes,
            staged_bytes=self.staged_bytes,
            reciprocal_cols=1 / self.columns,
            threshold=6554 if self.drops else 0,
            scale=1.1 if self.drops else 1.0,
            **dict.fromkeys(strides, self.columns),
        )


_OF_ONE_ARCHITECTURE: tuple[Kernel, ...] = (
    *(ForwardKernel(columns, torch.bfloat16) for columns in (768, 1024, 4096, 16384, 65536)),
    *(ForwardKernel(columns, torch.float32) for columns in (4096, 16384)),
    ForwardKernel(4096, torch.bfloat16, adds=True),
    ForwardKernel(4096, torch.bfloat16, adds=True, drops=True),
    *(BackwardKernel(columns, torch.bfloat16) for columns in (1024, 16384)),
    *(BackwardKernel(columns, torch.float32) for columns in (4096, 16384)),
)

KERNELS = {
    architecture: tuple(replace(kernel, architecture=architecture) for kernel in _OF_ONE_ARCHITECTURE)
    for architecture in CONSTANTS
}
