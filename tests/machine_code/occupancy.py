# SPDX-License-Identifier: BSD-3-Clause
"""How much of a multiprocessor of compute capability 9.0 a kernel fills."""

from __future__ import annotations

WARP = 32
MOST_BLOCKS, MOST_WARPS = 32, 64
REGISTERS, REGISTER_UNIT, SCHEDULERS = 65536, 256, 4  # a warp's registers come in units, from its scheduler's share
SHARED_BYTES, SHARED_UNIT, RESERVED_BYTES = 228 << 10, 128, 1 << 10  # of a block, the last for the system


def resident_blocks(threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks run on a multiprocessor at once, where enough are launched."""
    warps = threads // WARP
    warp_registers = rounded_up(registers * WARP, REGISTER_UNIT)
    warps_with_registers = REGISTERS // SCHEDULERS // warp_registers * SCHEDULERS
    block_bytes = rounded_up(shared_bytes, SHARED_UNIT) + RESERVED_BYTES
    return min(MOST_BLOCKS, MOST_WARPS // warps, warps_with_registers // warps, SHARED_BYTES // block_bytes)


def rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
