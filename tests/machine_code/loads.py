# SPDX-License-Identifier: BSD-3-Clause
"""What one lane has asked global memory for, and where it waits for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    number: int  # in the order of the lane's loads
    address: int
    size: int


@dataclass(frozen=True)
class Wait:
    step: int  # of the lane: an instruction that waits for several loads waits once
    is_dependent: bool  # one of the loads was asked for after the wait before: they wait one after the other
    loads: tuple[Load, ...]  # that must be back
    outstanding: tuple[Load, ...]  # that were on their way, those among them


class Loads:
    """Loads into registers, which return in order, and asynchronous copies into shared memory, which are waited for in
    groups."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.count = 0
        self._count_at_wait = 0  # how many there were when a lane last waited
        self._outstanding: list[Load] = []
        self._writes: dict[str, Load] = {}  # by register
        self._open_group: list[Load] = []
        self._groups: list[list[Load]] = []

    def load(self, address: int, size: int, registers: Iterable[str]) -> None:
        load = self._next(address, size)
        self._outstanding.append(load)
        self._writes.update(dict.fromkeys(registers, load))

    def overwrite(self, register: str) -> None:
        self._writes.pop(register, None)

    def use(self, register: str, step: int) -> None:
        load = self._writes.pop(register, None)
        if load is None or load not in self._outstanding:
            return
        self._wait(step, (load,), tuple(self._outstanding))
        self._outstanding = [other for other in self._outstanding if other.number > load.number]

    def copy(self, address: int, size: int) -> None:
        self._open_group.append(self._next(address, size))

    def commit_copies(self) -> None:
        self._groups.append(self._open_group)
        self._open_group = []

    def wait_for_copies(self, most_groups_left: int, step: int) -> None:
        back = self._groups[: max(0, len(self._groups) - most_groups_left)]
        if any(back):
            self._wait(step, _flat(back), _flat(self._groups))
        self._groups = self._groups[len(back) :]

    def _wait(self, step: int, loads: tuple[Load, ...], outstanding: tuple[Load, ...]) -> None:
        is_dependent = any(load.number > self._count_at_wait for load in loads)
        if is_dependent:
            self._count_at_wait = self.count
        self.waits.append(Wait(step, is_dependent, loads, outstanding))

    def _next(self, address: int, size: int) -> Load:
        self.count += 1
        return Load(self.count, address, size)


def _flat(groups: Iterable[list[Load]]) -> tuple[Load, ...]:
    return tuple(load for group in groups for load in group)
