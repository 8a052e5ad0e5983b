# SPDX-License-Identifier: BSD-3-Clause
"""Walks one lane through a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from . import floats, integers, memory
from .lane import Effect, Lane
from .sass import INSTRUCTION_BYTES, Instruction

MOST_STEPS = 100_000  # more than any kernel here takes for a few rows


class CannotInterpret(Exception):
    """There is an instruction that is not known here, or the lane went another way than was meant."""


def walk(lane: Lane, code: Sequence[Instruction]) -> None:
    """Until the lane exits."""
    while lane.step < MOST_STEPS:
        instruction = code[lane.position]
        lane.position += 1
        lane.step += 1
        lane.issued[instruction.opcode] += 1
        try:
            if not lane.condition(instruction.guard):
                continue
            if instruction.name == "EXIT":
                return
            effect_of(instruction.opcode)(lane, instruction)
        except Exception as error:
            raise CannotInterpret(f"{instruction}: {error!r}") from error
    raise CannotInterpret(f"no end after {MOST_STEPS} instructions")


@cache
def effect_of(opcode: str) -> Effect:
    name, *modifiers = opcode.split(".")
    for known in (name, name.removeprefix("U")):  # a uniform instruction does what that of a lane does
        if known in WITHOUT_EFFECT:
            return do_nothing
        if known in EFFECTS:
            effect, known_modifiers = EFFECTS[known]
            if unknown := set(modifiers) - set(known_modifiers.split()):
                raise LookupError(f"unknown modifiers: {', '.join(unknown)}")
            return effect
    raise LookupError("unknown instruction")


def branch(lane: Lane, instruction: Instruction) -> None:
    """BRA [condition,] target; DIV: for a warp whose lanes have parted, not taken."""
    *conditions, target = instruction.operands
    if "DIV" not in instruction.modifiers and all(lane.condition(condition) for condition in conditions):
        lane.position = lane.unsigned(target) // INSTRUCTION_BYTES


def do_nothing(lane: Lane, instruction: Instruction) -> None:
    pass


# What orders, synchronizes or prepares, whatever its modifiers: for a lane alone it is as if nothing happened.
WITHOUT_EFFECT = {
    *("NOP", "BSSY", "BSYNC", "WARPSYNC", "YIELD", "BAR", "UCGABAR_ARV", "UCGABAR_WAIT"),
    *("MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "FENCE", "PREEXIT"),
}

EFFECTS: dict[str, tuple[Effect, str]] = {
    **integers.EFFECTS,
    **floats.EFFECTS,
    **memory.EFFECTS,
    "BRA": (branch, "U DIV"),
}
