# SPDX-License-Identifier: BSD-3-Clause
"""The state of one lane of a warp: registers, predicates, memory, and how operands are read and written."""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from .loads import Loads
from .sass import ALWAYS, Instruction, Operand

MASK = 0xFFFFFFFF
WIDE_MASK = 0xFFFFFFFFFFFFFFFF


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of(value: float) -> int:
    try:
        return struct.unpack("<I", struct.pack("<f", value))[0]
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


class ConstantBank:
    """What a launch puts into constant memory: its shape and the kernel's arguments."""

    def __init__(self, contents: Mapping[int, bytes]):
        self._bytes = {at + i: byte for at, data in contents.items() for i, byte in enumerate(data)}

    def read(self, at: int, size: int) -> int:
        try:
            return int.from_bytes([self._bytes[at + i] for i in range(size)], "little")
        except KeyError as error:
            raise LookupError(f"nothing is known to lie in constant memory at {error.args[0]:#x}") from None


class Lane:
    def __init__(self, constants: ConstantBank, special_registers: Mapping[str, int]):
        self.constants = constants
        self.special_registers = special_registers
        self.position = 0  # of the next instruction
        self.step = 0  # how many instructions were issued, those whose guard is false among them
        self.issued: Counter[str] = Counter()  # the same by opcode
        self.loads = Loads()
        self.stored: list[tuple[int, int]] = []  # in global memory: address and bytes
        self.shared: dict[int, int] = {}  # words
        self.local: dict[int, int] = {}
        self._registers: defaultdict[str, int] = defaultdict(int)
        self._predicates: defaultdict[str, bool] = defaultdict(bool)

    def unsigned(self, operand: Operand) -> int:
        return self._integer(operand, 32)

    def signed(self, operand: Operand) -> int:
        return signed(self._integer(operand, 32))

    def wide(self, operand: Operand) -> int:
        """Of a pair of registers or 64 bits of constant memory."""
        return self._integer(operand, 64)

    def addend(self, operand: Operand) -> int:
        """As adders take it whose carry counts: -x is ~x + 1."""
        if operand.sign == "-" and operand.kind != "immediate":
            return (~self._magnitude(operand, 32) & MASK) + 1
        return self.unsigned(operand)

    def real(self, operand: Operand) -> float:
        if operand.kind == "immediate" and not operand.text.startswith("0x"):
            value = float(operand.text.replace("QNAN", "nan"))
        else:
            value = float_of(self._magnitude(operand, 32))
        value = abs(value) if operand.absolute else value
        return -value if operand.sign == "-" else value

    def reals(self, operand: Operand) -> list[float]:
        """Of a pair of registers, or one number twice."""
        words = self.words(operand, 2 if operand.is_pair else 1)
        sign = -1 if operand.sign == "-" else 1
        return [sign * float_of(word) for word in words] * (1 if operand.is_pair else 2)

    def condition(self, operand: Operand) -> bool:
        if operand.kind != "predicate":
            raise ValueError(f"not a predicate: {operand.text}")
        value = is_always(operand) or self._predicates[operand.text]
        return value != (operand.sign == "!")

    def address(self, operand: Operand) -> int:
        return sum(
            signed(self.wide(term), 64) if term.is_pair or term.kind == "immediate" else self.unsigned(term)
            for term in operand.terms
        )

    def words(self, operand: Operand, count: int) -> list[int]:
        """Of `count` consecutive registers."""
        return [self._read(register) for register in registers(operand, count)]

    def write(self, operand: Operand, value: int) -> None:
        self.write_words(operand, [value & MASK])

    def write_wide(self, operand: Operand, value: int) -> None:
        self.write_words(operand, [value & MASK, value >> 32 & MASK])

    def write_real(self, operand: Operand, value: float) -> None:
        self.write(operand, bits_of(value))

    def write_words(self, operand: Operand, words: list[int]) -> None:
        for register, word in zip(registers(operand, len(words)), words):
            if not is_zero(register):
                self.loads.overwrite(register)
                self._registers[register] = word

    def write_condition(self, operand: Operand, value: bool) -> None:
        if not is_always(operand):
            self._predicates[operand.text] = value

    def _integer(self, operand: Operand, bits: int) -> int:
        mask = (1 << bits) - 1
        value = self._magnitude(operand, bits)
        if operand.absolute:
            value = abs(signed(value, bits))
        if operand.sign == "-":
            value = -value
        elif operand.sign == "~":
            value = ~value
        return value & mask

    def _magnitude(self, operand: Operand, bits: int) -> int:
        """Without the signs before it."""
        if operand.kind == "register":
            words = self.words(operand, bits // 32)
            return sum(word << 32 * i for i, word in enumerate(words))
        if operand.kind == "constant":
            return self.constants.read(self.address(operand), bits // 8)
        if operand.kind == "immediate" and operand.text.startswith("0x"):
            return int(operand.text, 16)
        raise ValueError(f"not a number: {operand.text}")

    def _read(self, register: str) -> int:
        if is_zero(register):
            return 0
        self.loads.use(register, self.step)
        return self._registers[register]


Effect = Callable[[Lane, Instruction], None]  # what an instruction does


def registers(operand: Operand, count: int) -> list[str]:
    """The names of `count` consecutive ones. The zero register is followed by itself."""
    name = operand.text
    if is_zero(name):
        return [name] * count
    prefix = name.rstrip("0123456789")
    first = int(name.removeprefix(prefix))
    return [f"{prefix}{number}" for number in range(first, first + count)]


def is_always(predicate: Operand) -> bool:
    return predicate.text.removeprefix("U") == ALWAYS


def is_zero(register: str) -> bool:
    return register.endswith("Z")
