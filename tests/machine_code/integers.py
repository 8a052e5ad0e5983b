# SPDX-License-Identifier: BSD-3-Clause
"""What integer and predicate instructions do. Uniform ones (UIADD3) do what those without the U do."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from .lane import MASK, WIDE_MASK, Lane, signed
from .sass import Instruction, Operand


@dataclass(frozen=True)
class Parts:
    """The operands of an instruction with carries: to, predicates to carry out into, sources, predicates carried in."""

    to: Operand
    carries_out: list[Operand]
    sources: list[Operand]
    carries_in: list[Operand]

    def carry_in(self, lane: Lane) -> int:
        return sum(lane.condition(carry) for carry in self.carries_in)

    def write(self, lane: Lane, total: int) -> None:
        lane.write(self.to, total)
        for count, carry in enumerate(self.carries_out, start=1):
            lane.write_condition(carry, total >> 32 >= count)


def parts_of(instruction: Instruction) -> Parts:
    to, *others = instruction.operands
    sources = [operand for operand in others if operand.kind != "predicate"]
    first = others.index(sources[0])
    return Parts(to, others[:first], sources, others[first + len(sources) :])


def add(lane: Lane, instruction: Instruction) -> None:
    parts = parts_of(instruction)
    parts.write(lane, sum(lane.addend(source) for source in parts.sources) + parts.carry_in(lane))


def multiply_add(lane: Lane, instruction: Instruction) -> None:
    parts = parts_of(instruction)
    a, b, c = parts.sources
    read = lane.unsigned if "U32" in instruction.modifiers else lane.signed
    if "WIDE" in instruction.modifiers:
        total = (read(a) * read(b) & WIDE_MASK) + lane.wide(c) + parts.carry_in(lane)
        lane.write_wide(parts.to, total)
        for carry in parts.carries_out:
            lane.write_condition(carry, total > WIDE_MASK)
    elif parts.carries_out:
        raise NotImplementedError("a carry out of 32 bits")
    elif "HI" in instruction.modifiers:
        lane.write(parts.to, read(a) * read(b) + lane.wide(c) >> 32)
    else:
        lane.write(parts.to, read(a) * read(b) + read(c) + parts.carry_in(lane))


def shift_add(lane: Lane, instruction: Instruction) -> None:
    """LEA: (a << shift) + b, or with HI the upper half of that of a pair, whose upper register is c or with SX32 a's
    sign."""
    parts = parts_of(instruction)
    *sources, last = parts.sources
    a, b = lane.unsigned(sources[0]), lane.addend(sources[1])
    shift = lane.unsigned(last)
    if "SX32" in instruction.modifiers:
        shifted = signed(a) << shift >> 32
    elif "HI" in instruction.modifiers:
        shifted = (lane.unsigned(sources[2]) << 32 | a) << shift >> 32
    else:
        shifted = a << shift
    parts.write(lane, (shifted & MASK) + b + parts.carry_in(lane))


def shift(lane: Lane, instruction: Instruction) -> None:
    """SHF to, low, distance, high: of the pair high:low."""
    to, low, distance, high = instruction.operands
    modifiers = instruction.modifiers
    is_wide, is_signed = bool(modifiers & {"S64", "U64"}), bool(modifiers & {"S32", "S64"})
    pair = lane.unsigned(high) << 32 | lane.unsigned(low)
    pair = signed(pair, 64) if is_signed else pair
    bits = lane.unsigned(distance)
    bits = bits % (64 if is_wide else 32) if "W" in modifiers else min(bits, 64 if is_wide else 32)
    shifted = pair << bits if "L" in modifiers else pair >> bits
    lane.write(to, shifted >> 32 if "HI" in modifiers else shifted)


def logic(lane: Lane, instruction: Instruction) -> None:
    """LOP3.LUT [whether it is not 0,] to, a, b, c, table, or"""
    *whether, to, a, b, c, table, otherwise = instruction.operands
    value = look_up(lane.unsigned(table), lane.unsigned(a), lane.unsigned(b), lane.unsigned(c))
    lane.write(to, value)
    for predicate in whether:
        lane.write_condition(predicate, value & MASK != 0 or lane.condition(otherwise))


def look_up(table: int, a: int, b: int, c: int) -> int:
    """Bit by bit what the table of 8 bits says of three."""
    terms = ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1)
    result = 0
    for term in terms:
        result |= term
    return result


def predicate_logic(lane: Lane, instruction: Instruction) -> None:
    first, second, a, b, c, *tables = instruction.operands
    inputs = [-lane.condition(predicate) for predicate in (a, b, c)]
    for to, table in zip((first, second), tables, strict=True):
        lane.write_condition(to, look_up(lane.unsigned(table), *inputs) & 1 == 1)


COMPARISONS = {
    "LT": operator.lt,
    "LE": operator.le,
    "EQ": operator.eq,
    "NE": operator.ne,
    "GE": operator.ge,
    "GT": operator.gt,
}
COMBINATIONS = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}


def one_of(table: dict[str, Callable], modifiers: frozenset[str]) -> Callable:
    (name,) = modifiers & table.keys()
    return table[name]


def compare(lane: Lane, instruction: Instruction) -> None:
    """ISETP to, its opposite, a, b, other: (a ? b) and, or, xor other. EX: of two words' upper ones, where the lower
    ones' comparison, the last operand, decides between equal ones."""
    to, opposite, a, b, other, *lower = instruction.operands
    read = lane.unsigned if "U32" in instruction.modifiers else lane.signed
    x, y = read(a), read(b)
    if lower and x == y:
        result = lane.condition(lower[0])
    else:
        result = one_of(COMPARISONS, instruction.modifiers)(x, y)
    combine = one_of(COMBINATIONS, instruction.modifiers)
    combined = combine(result, lane.condition(other)), combine(not result, lane.condition(other))
    for predicate, value in zip((to, opposite), combined, strict=True):
        lane.write_condition(predicate, value)


def select(lane: Lane, instruction: Instruction) -> None:
    to, a, b, predicate = instruction.operands
    lane.write(to, lane.unsigned(a if lane.condition(predicate) else b))


def smaller_or_larger(lane: Lane, instruction: Instruction) -> None:
    """IMNMX, VIMNMX to, a, b, whether the smaller; VIADDMNMX of a + b and c."""
    to, *sources, takes_smaller = instruction.operands
    bits = [lane.unsigned(source) for source in sources]
    if instruction.name == "VIADDMNMX":
        bits = [bits[0] + bits[1] & MASK, bits[2]]
    values = bits if "U32" in instruction.modifiers else [signed(value) for value in bits]
    lane.write(to, min(values) if lane.condition(takes_smaller) else max(values))


def absolute(lane: Lane, instruction: Instruction) -> None:
    to, source = instruction.operands
    lane.write(to, abs(lane.signed(source)))


def find_leading_one(lane: Lane, instruction: Instruction) -> None:
    """FLO: the place of the highest bit."""
    to, source = instruction.operands
    lane.write(to, lane.unsigned(source).bit_length() - 1)


def move(lane: Lane, instruction: Instruction) -> None:
    *_, to, source = instruction.operands
    lane.write(to, lane.unsigned(source))


def permute(lane: Lane, instruction: Instruction) -> None:
    """PRMT to, a, selector, b: each nibble picks a byte of b:a, or with its highest bit that byte's sign."""
    to, a, selector, b = instruction.operands
    source, nibbles, result = lane.unsigned(b) << 32 | lane.unsigned(a), lane.unsigned(selector), 0
    for place in range(4):
        nibble = nibbles >> 4 * place & 0xF
        byte = source >> 8 * (nibble & 7) & 0xFF
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * place
    lane.write(to, result)


def predicates_to_register(lane: Lane, instruction: Instruction) -> None:
    """P2R to, PR, base, mask; B1 to B3: into that byte of base."""
    to, _, base, mask = instruction.operands
    at = byte_place(instruction)
    bits = sum(lane.condition(predicate) << i for i, predicate in enumerate(PREDICATES))
    chosen = lane.unsigned(mask)
    lane.write(to, lane.unsigned(base) & ~(chosen << at) | (bits & chosen) << at)


def register_to_predicates(lane: Lane, instruction: Instruction) -> None:
    _, source, mask = instruction.operands
    bits = lane.unsigned(source) >> byte_place(instruction)
    for i, predicate in enumerate(PREDICATES):
        if lane.unsigned(mask) >> i & 1:
            lane.write_condition(predicate, bits >> i & 1 == 1)


PREDICATES = [Operand("predicate", f"P{i}") for i in range(7)]


def byte_place(instruction: Instruction) -> int:
    """The lowest bit of the byte that a modifier names."""
    return next((8 * i for i in range(4) if f"B{i}" in instruction.modifiers), 0)


def vote(lane: Lane, instruction: Instruction) -> None:
    """As if all lanes of the warp had the same to say."""
    *results, predicate = instruction.operands
    agreed = lane.condition(predicate)
    for to in results:
        if to.kind == "predicate":
            lane.write_condition(to, agreed)
        else:
            lane.write(to, MASK if agreed else 0)


def elect(lane: Lane, instruction: Instruction) -> None:
    """Lane 0 is elected."""
    elected, leader, _ = instruction.operands
    lane.write_condition(elected, True)
    lane.write(leader, 0)


_COMPARE = f"{' '.join(COMPARISONS)} {' '.join(COMBINATIONS)}"

# By name: what it does, and which modifiers it knows of.
EFFECTS = {
    "IADD3": (add, "X"),
    "VIADD": (add, ""),
    "IMAD": (multiply_add, "MOV SHL IADD U32 X WIDE HI"),
    "LEA": (shift_add, "HI X SX32"),
    "SHF": (shift, "L R W HI U32 S32 U64 S64"),
    "LOP3": (logic, "LUT"),
    "PLOP3": (predicate_logic, "LUT"),
    "ISETP": (compare, f"{_COMPARE} U32 EX"),
    "SEL": (select, ""),
    "IMNMX": (smaller_or_larger, "U32"),
    "VIMNMX": (smaller_or_larger, "U32"),
    "VIADDMNMX": (smaller_or_larger, "U32"),
    "IABS": (absolute, ""),
    "FLO": (find_leading_one, "U32"),
    "MOV": (move, ""),
    "R2UR": (move, ""),
    "PRMT": (permute, ""),
    "P2R": (predicates_to_register, "B0 B1 B2 B3"),
    "R2P": (register_to_predicates, "B0 B1 B2 B3"),
    "VOTE": (vote, "ALL ANY"),
    "VOTEU": (vote, "ALL ANY"),
    "ELECT": (elect, ""),
}
