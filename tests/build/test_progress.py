# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import itertools
import re
import sys

import pytest

from resnorm_ext.build import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def run(clock: list[float], seconds: int) -> None:
    with progress.Progress("kernels") as build:
        for second in range(seconds):
            clock[0] += 1
            assert build(f"[{second}/{seconds}] unit {second}.cpp" if second % 7 == 0 else "")


def test_elsewhere_than_on_a_terminal_a_line_at_least_every_ten_seconds(clock: list[float], capsys):
    run(clock, 35)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("kernels") and lines[-1] == "resnorm_ext: compiled in 35 s"
    said = [0, *(int(match[1]) for line in lines[1:-1] if (match := re.search(r", (\d+) s$", line))), 35]
    assert len(said) == len(lines) and all(0 < later - sooner <= 10 for sooner, later in itertools.pairwise(said))
    assert "14 of 35 compiled, last unit 14.cpp, 1" in lines[2]


def test_on_a_terminal_one_line_that_moves(clock: list[float], capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(clock, 35)
    first, *moving, last = capsys.readouterr().err.split("\r\033[K")
    assert first.endswith("kernels\n") and last == "\nresnorm_ext: compiled in 35 s\n"[1:]
    assert moving[20] == "14 of 35 compiled, last unit 14.cpp, 21 s" and len(moving) == 35


def test_what_a_compiler_says_is_no_progress(clock: list[float], capsys):
    with progress.Progress("kernels") as build:
        assert not build("python.cpp:1:2: error: no")
