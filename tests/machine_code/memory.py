# SPDX-License-Identifier: BSD-3-Clause
"""What loads, stores and synchronization do. Memory that the lane did not write itself holds numbers near 1."""

from __future__ import annotations

from .lane import MASK, Lane, registers
from .sass import Instruction

SIZES = {"U8": 1, "U16": 2, "64": 8, "128": 16}


def size_of(instruction: Instruction) -> int:
    return next((size for modifier, size in SIZES.items() if modifier in instruction.modifiers), 4)


def words_of(instruction: Instruction) -> int:
    return (size_of(instruction) + 3) // 4


def number_at(address: int) -> int:
    """Read as a float32 or two bfloat16 it is near 1, and not everywhere the same."""
    return 0x3F803F40 + address // 4 % 7 * 0x00010001


def load_constant(lane: Lane, instruction: Instruction) -> None:
    to, source = instruction.operands
    value = lane.constants.read(lane.address(source) & MASK, size_of(instruction))
    lane.write_words(to, [value >> 32 * i & MASK for i in range(words_of(instruction))])


def load_special(lane: Lane, instruction: Instruction) -> None:
    to, source = instruction.operands
    is_wide = instruction.name == "CS2R" and "32" not in instruction.modifiers
    lane.write_words(to, [lane.special_registers[source.text], 0][: 1 + is_wide])


def load_global(lane: Lane, instruction: Instruction) -> None:
    to, source = instruction.operands
    address, size, count = lane.address(source), size_of(instruction), words_of(instruction)
    mask = (1 << 8 * min(size, 4)) - 1
    lane.write_words(to, [number_at(address + 4 * i) & mask for i in range(count)])
    lane.loads.load(address, size, registers(to, count))


def copy_global(lane: Lane, instruction: Instruction) -> None:
    _, source = instruction.operands
    lane.loads.copy(lane.address(source), size_of(instruction))


def commit_copies(lane: Lane, instruction: Instruction) -> None:
    lane.loads.commit_copies()


def wait_for_copies(lane: Lane, instruction: Instruction) -> None:
    _, most_left = instruction.operands
    lane.loads.wait_for_copies(lane.unsigned(most_left), lane.step)


def store_global(lane: Lane, instruction: Instruction) -> None:
    to, source = instruction.operands
    lane.words(source, words_of(instruction))
    lane.stored.append((lane.address(to), size_of(instruction)))


def store_remote(lane: Lane, instruction: Instruction) -> None:
    """ST, STAS: into another block's shared memory. What other blocks store here is memory like any other."""
    to, source = instruction.operands
    lane.address(to)
    lane.words(source, words_of(instruction))


def remote_address(lane: Lane, instruction: Instruction) -> None:
    to, local, rank = instruction.operands
    lane.write(to, lane.unsigned(rank) << 24 | lane.unsigned(local) & 0xFFFFFF)


def load_own(lane: Lane, instruction: Instruction) -> None:
    to, source = instruction.operands
    at, memory = lane.address(source), own_memory(lane, instruction)
    lane.write_words(to, [memory.get(place, number_at(place)) for place in range(at, at + size_of(instruction), 4)])


def store_own(lane: Lane, instruction: Instruction) -> None:
    to, source = instruction.operands
    at, memory = lane.address(to), own_memory(lane, instruction)
    for i, word in enumerate(lane.words(source, words_of(instruction))):
        memory[at + 4 * i] = word


def own_memory(lane: Lane, instruction: Instruction) -> dict[int, int]:
    return lane.shared if instruction.name in ("LDS", "STS") else lane.local


def shuffle(lane: Lane, instruction: Instruction) -> None:
    """SHFL is inside, to, source, ...: as if the other lane held what this one does."""
    is_inside, to, source, *_ = instruction.operands
    lane.write_condition(is_inside, True)
    lane.write(to, lane.unsigned(source))


def use_transaction_barrier(lane: Lane, instruction: Instruction) -> None:
    """SYNCS result, barrier, operands...: whoever asks whether what it waits for has come is told that it has."""
    result, _, *sources = instruction.operands
    for source in sources:
        lane.words(source, words_of(instruction))
    if result.kind == "predicate":
        lane.write_condition(result, True)
    else:
        lane.write(result, 0)


def await_previous_kernel(lane: Lane, instruction: Instruction) -> None:
    """ACQBULK: what a launch that overlaps the kernel before it must not do earlier is touch global memory."""
    if lane.loads.count or lane.stored:
        raise ValueError("global memory was touched before the previous kernel was awaited")


_SIZES = " ".join(SIZES)

# By name: what it does, and which modifiers it knows of.
EFFECTS = {
    "ACQBULK": (await_previous_kernel, ""),
    "LDC": (load_constant, _SIZES),
    "LDCU": (load_constant, _SIZES),
    "S2R": (load_special, ""),
    "S2UR": (load_special, ""),
    "CS2R": (load_special, "32"),
    "LDG": (load_global, f"E NA CONSTANT {_SIZES}"),
    "LDGSTS": (copy_global, "E BYPASS 64 128"),
    "LDGDEPBAR": (commit_copies, ""),
    "DEPBAR": (wait_for_copies, "LE"),
    "STG": (store_global, f"E {_SIZES}"),
    "ST": (store_remote, f"E {_SIZES}"),
    "STAS": (store_remote, "64 128"),
    "MAPA": (remote_address, ""),
    "LDS": (load_own, "64 128"),
    "STS": (store_own, "64 128"),
    "LDL": (load_own, "LU 64 128"),
    "STL": (store_own, "64 128"),
    "SHFL": (shuffle, "BFLY IDX UP DOWN"),
    "SYNCS": (use_transaction_barrier, "EXCH ARRIVE PHASECHK TRANS64 TRYWAIT 64"),
}
