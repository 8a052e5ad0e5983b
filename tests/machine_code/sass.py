# SPDX-License-Identifier: BSD-3-Clause
"""The machine code of a cubin (SASS), as instructions whose operands are taken apart."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

INSTRUCTION_BYTES = 16
ALWAYS = "PT"  # the predicate of an instruction that has none


@dataclass(frozen=True)
class Operand:
    """For example R4, -|R4|, ~R4, R4.64, R4.F32x2.HI_LO, R4.F32, UR4, RZ, P0, !P0, 0x10, 0.5, +INF, c[0x0][0x210],
    [R2+UR4+0x8], desc[UR4][R2.64], SR_TID.X."""

    kind: str  # register, predicate, constant, address, immediate, name
    text: str  # without signs and suffixes
    sign: str = ""  # - or ~ or !
    absolute: bool = False
    is_pair: bool = False  # of registers: .64, .F32x2.HI_LO
    terms: tuple[Operand, ...] = ()  # whose sum is the place, of a constant or an address


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands_text: str
    guard_text: str

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(_operand(text.strip()) for text in self.operands_text.split(",")) if self.operands_text else ()

    @cached_property
    def guard(self) -> Operand:
        return _operand(self.guard_text)

    @cached_property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @cached_property
    def modifiers(self) -> frozenset[str]:
        return frozenset(self.opcode.split(".")[1:])

    def __str__(self) -> str:
        guard = "" if self.guard_text == ALWAYS else f"@{self.guard_text} "
        return f"{guard}{self.opcode} {self.operands_text}"


def disassemble(nvdisasm: Path, cubin: Path) -> dict[str, list[Instruction]]:
    """The code of every kernel by its mangled name; an instruction's place in it is its address / INSTRUCTION_BYTES."""
    output = subprocess.run([nvdisasm, "--emit-json", cubin], check=True, stdout=subprocess.PIPE).stdout
    _, functions = json.loads(output)
    return {
        function["function-name"]: [
            _instruction(raw["opcode"], raw.get("operands", ""), raw.get("predicate", ""))
            for raw in function["sass-instructions"]
        ]
        for function in functions
    }


@cache
def _instruction(opcode: str, operands: str, predicate: str) -> Instruction:
    if predicate == "PR":  # nvdisasm takes P2R's second operand, all predicates together, for its guard
        operands, predicate = operands.replace(",", ",PR,", 1), ""
    return Instruction(opcode, operands, predicate.removeprefix("@") or ALWAYS)


_KINDS = {
    "register": r"U?R(\d+|Z)",
    "predicate": r"U?P(\d|T)",
    "constant": r"c\[0x0\]\[(?P<constant_terms>[^\]]+)\]",
    "address": r"(desc\[\w+\])?\[(?P<address_terms>[^\]]*)\]",
    "immediate": r"0x[0-9a-f]+|\+?INF|QNAN|\d+(\.\d+)?(e[+-]\d+)?",
    "name": r"[\w.$]+",
}
_ANY_KIND = "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _KINDS.items())
_OPERAND = re.compile(rf"(?P<sign>[-~!]?)(?P<bar>\|?)(?:{_ANY_KIND})\|?(?P<suffixes>(\.[A-Za-z]\w*|\.64)*)")


@cache
def _operand(text: str) -> Operand:
    match = _OPERAND.fullmatch(text)
    if match is None:
        raise ValueError(f"an operand that is not known: {text}")
    kind = next(kind for kind in _KINDS if match[kind] is not None)
    suffixes = set(match["suffixes"].split(".")) - {"", "reuse", "U32"}
    if kind != "name" and suffixes - {"64", "F32", "F32x2", "HI_LO"}:
        raise ValueError(f"an operand with a suffix that is not known: {text}")
    terms = match["constant_terms"] or match["address_terms"] or ""
    return Operand(
        kind,
        match[kind],
        sign=match["sign"],
        absolute=match["bar"] == "|",
        is_pair=bool(suffixes & {"64", "F32x2"}),
        terms=tuple(_operand(term) for term in re.findall(r"-?[^-+]+", terms)),
    )
