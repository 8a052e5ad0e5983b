# SPDX-License-Identifier: BSD-3-Clause
"""How much memory this process has had."""

from __future__ import annotations

import re
from pathlib import Path


def peak_memory() -> int:
    """Most bytes that this process has had in memory.

    Not getrusage's ru_maxrss, in which Linux counts what the process that started this one had.
    """
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))
