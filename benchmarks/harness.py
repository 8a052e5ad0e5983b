# SPDX-License-Identifier: BSD-3-Clause
"""How everything here is timed and what a result holds.

Contenders run in turn, one sample of each after the other, so that all meet the machine in the same state; a figure is
the median of its samples, and what is quoted are ratios within one run. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from resnorm_ext._extension import extension

# A fresh output of a few MB costs more in page faults than the kernel that fills it, and which call pays depends on
# their order. With these the allocator keeps its pages, for every contender alike.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}

SAMPLE_SECONDS = 2e-3  # a sample repeats a short call until it lasts this long


def start(description: str) -> argparse.Namespace:
    """Parses the options that all suites share and restarts Python under the allocator settings."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--samples", type=int, default=25, help="samples of each contender in each case")
    parser.add_argument("--output", type=Path, help="append the results to this file, one JSON object a line")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})
    torch.set_num_threads(options.threads)
    return options


def time_in_turn(contenders: dict[str, Callable[[], object]], samples: int) -> dict[str, float]:
    """Median seconds of one call of each contender."""
    repeats = {name: _repeats(call) for name, call in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(samples):
        for name, call in contenders.items():
            seconds[name].append(_time(call, repeats[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def copy_bandwidth(bytes_moved: int, samples: int) -> float:
    """Bytes per second of a plain copy that reads and writes ``bytes_moved`` in all: the roof of that size."""
    source = torch.empty(max(1, bytes_moved // 8), dtype=torch.float32)
    target = torch.empty_like(source)
    return bytes_moved / time_in_turn({"copy": lambda: target.copy_(source)}, samples)["copy"]


def environment() -> dict[str, object]:
    """The hardware, versions and settings that a figure belongs to."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": extension.cpu_isa(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": git.stdout.strip() or None,
        "allocator": ALLOCATOR,
    }


def write(path: Path | None, suite: str, records: Iterable[dict[str, object]]) -> None:
    """Appends ``{"suite", "environment", **record}`` for each record."""
    if path is None:
        return
    where = environment()
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({"suite": suite, "environment": where, **record}) + "\n")


def _repeats(call: Callable[[], object]) -> int:
    for _ in range(3):
        call()
    return max(1, round(SAMPLE_SECONDS / max(_time(call, 1), 1e-7)))


def _time(call: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
