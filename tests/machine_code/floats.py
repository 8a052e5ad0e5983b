# SPDX-License-Identifier: BSD-3-Clause
"""What float instructions do, rounded once to float32 whatever the rounding they name."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from .integers import COMBINATIONS, COMPARISONS, one_of
from .lane import MASK, Effect, Lane, bits_of, float_of
from .sass import Instruction


def add(lane: Lane, instruction: Instruction) -> None:
    to, a, b = instruction.operands
    lane.write_real(to, lane.real(a) + lane.real(b))


def multiply(lane: Lane, instruction: Instruction) -> None:
    to, a, b = instruction.operands
    lane.write_real(to, lane.real(a) * lane.real(b))


def multiply_add(lane: Lane, instruction: Instruction) -> None:
    to, a, b, c = instruction.operands
    lane.write_real(to, lane.real(a) * lane.real(b) + lane.real(c))


def of_pairs(operation: Callable[..., float]) -> Effect:
    """FADD2, FMUL2, FFMA2: of two numbers each; an operand that is one number counts twice."""

    def effect(lane: Lane, instruction: Instruction) -> None:
        to, *sources = instruction.operands
        pairs = [lane.reals(source) for source in sources]
        lane.write_words(to, [bits_of(operation(*numbers)) for numbers in zip(*pairs)])

    return effect


def smaller_or_larger(lane: Lane, instruction: Instruction) -> None:
    to, a, b, takes_smaller = instruction.operands
    choose = min if lane.condition(takes_smaller) else max
    numbers = [value for value in (lane.real(a), lane.real(b)) if not math.isnan(value)]
    lane.write_real(to, choose(numbers, default=math.nan))


def select(lane: Lane, instruction: Instruction) -> None:
    to, a, b, predicate = instruction.operands
    lane.write_real(to, lane.real(a if lane.condition(predicate) else b))


# U: true of a NaN too.
FLOAT_COMPARISONS = COMPARISONS | {f"{name}U": compare for name, compare in COMPARISONS.items()}


def compare(lane: Lane, instruction: Instruction) -> None:
    """FSETP to, its opposite, a, b, other: (a ? b) and, or, xor other."""
    to, opposite, a, b, other = instruction.operands
    x, y = lane.real(a), lane.real(b)
    (name,) = instruction.modifiers & FLOAT_COMPARISONS.keys()
    unordered = math.isnan(x) or math.isnan(y)
    result = name.endswith("U") if unordered else FLOAT_COMPARISONS[name](x, y)
    combine = one_of(COMBINATIONS, instruction.modifiers)
    lane.write_condition(to, combine(result, lane.condition(other)))
    lane.write_condition(opposite, combine(not result, lane.condition(other)))


def division_is_easy(lane: Lane, instruction: Instruction) -> None:
    """FCHK says whether a / b needs the slow path; the lane's numbers never do."""
    hard, a, b = instruction.operands
    lane.real(a), lane.real(b)
    lane.write_condition(hard, False)


def approximate(lane: Lane, instruction: Instruction) -> None:
    to, source = instruction.operands
    x = lane.real(source)
    if x == 0:
        result = math.inf if "SQRT" not in instruction.modifiers else 0.0
    elif "RCP" in instruction.modifiers:
        result = 1 / x
    else:
        root = math.sqrt(x) if x >= 0 else math.nan
        result = root if "SQRT" in instruction.modifiers else 1 / root
    lane.write_real(to, result)


def integer_to_float(lane: Lane, instruction: Instruction) -> None:
    to, source = instruction.operands
    value = lane.unsigned(source) if "U32" in instruction.modifiers else lane.signed(source)
    bits = bits_of(value)
    if "RP" in instruction.modifiers and float_of(bits) < value:
        bits += 1 if value > 0 else -1
    lane.write(to, bits)


def float_to_integer(lane: Lane, instruction: Instruction) -> None:
    """F2I.U32.TRUNC"""
    to, source = instruction.operands
    value = lane.real(source)
    lane.write(to, int(min(max(value, 0), MASK)) if not math.isnan(value) else 0)


def pack(lane: Lane, instruction: Instruction) -> None:
    """Two bfloat16, cut off."""
    to, upper, lower = instruction.operands
    lane.write(to, bits_of(lane.real(upper)) >> 16 << 16 | bits_of(lane.real(lower)) >> 16)


def constant_halves(lane: Lane, instruction: Instruction) -> None:
    """HFMA2 to, -RZ, RZ, upper, lower, with which compilers write constants."""
    to, a, b, *halves = instruction.operands
    if (a.text, b.text, len(halves)) != ("RZ", "RZ", 2):
        raise NotImplementedError(f"half arithmetic: {instruction}")
    upper, lower = (struct.unpack("<H", struct.pack("<e", lane.real(half)))[0] for half in halves)
    lane.write(to, upper << 16 | lower)


_COMPARE = f"{' '.join(FLOAT_COMPARISONS)} {' '.join(COMBINATIONS)}"

# By name: what it does, and which modifiers it knows of.
EFFECTS = {
    "FADD": (add, "FTZ RZ RM RP"),
    "FMUL": (multiply, "FTZ RZ RM RP"),
    "FFMA": (multiply_add, "FTZ RZ RM RP"),
    "FADD2": (of_pairs(lambda a, b: a + b), ""),
    "FMUL2": (of_pairs(lambda a, b: a * b), ""),
    "FFMA2": (of_pairs(lambda a, b, c: a * b + c), ""),
    "FMNMX": (smaller_or_larger, "FTZ"),
    "FSEL": (select, "FTZ"),
    "FSETP": (compare, f"{_COMPARE} FTZ"),
    "FCHK": (division_is_easy, "FTZ"),
    "MUFU": (approximate, "RCP RSQ SQRT"),
    "I2F": (integer_to_float, "U32 S32 RP"),
    "I2FP": (integer_to_float, "F32 U32 S32"),
    "F2I": (float_to_integer, "FTZ U32 TRUNC NTZ"),
    "F2FP": (pack, "BF16 F32 PACK_AB"),
    "HFMA2": (constant_halves, "MMA"),
}
