# SPDX-License-Identifier: BSD-3-Clause
"""How far a build is, for whoever waits for it: on a terminal a line that moves, elsewhere a line now and then."""

from __future__ import annotations

import re
import sys
import time

# Seconds between lines where there is no terminal.
_PAUSE = 10


class Progress:
    """Says that compiling began and ended, and between them how much of it is done."""

    def __init__(self, what: str) -> None:
        self._what, self._done = what, "starting"
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        say(f"compiling the C++ extension, once, about 2 minutes on 2 cores and less on more: {self._what}")
        self._start = self._said = time.monotonic()
        return self

    def __call__(self, line: str) -> bool:
        """Takes a line that ninja wrote, or an empty one because time has passed; returns whether it is one of these
        and not a compiler's."""
        if finished := re.match(r"\[(\d+)/(\d+)\] (.*)", line):
            self._done = f"{finished[1]} of {finished[2]} compiled, last {finished[3]}"
        now = time.monotonic()
        if self._terminal:
            print(f"\r\033[K{self._done}, {now - self._start:.0f} s", end="", file=sys.stderr, flush=True)
        elif now - self._said >= _PAUSE - 1:  # it is called each second
            self._said = now
            say(f"{self._done}, {now - self._start:.0f} s")
        return finished is not None or not line

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if kind is None:
            say(f"compiled in {time.monotonic() - self._start:.0f} s")


def say(message: str) -> None:
    print(f"resnorm_ext: {message}", file=sys.stderr, flush=True)
