# SPDX-License-Identifier: BSD-3-Clause
"""From tests/, ``python -m machine_code [ROOT]`` prints what is counted of every kernel, of this checkout or of one at
ROOT. The plans are those of the built extension, so build it first."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from resnorm_ext.build import toolchain

from .compilation import ROOT, compile_kernels
from .counts import Counts, count
from .interpreter import CannotInterpret
from .kernels import KERNELS, Kernel


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m machine_code", description="Counts of the kernels' machine code.")
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="a checkout (default: this one)")
    root = parser.parse_args().root
    toolkit, reason = toolchain.find_toolkit()
    if toolkit is None:
        raise SystemExit(reason)
    failures = []
    for architecture, kernels in KERNELS.items():
        with tempfile.TemporaryDirectory() as folder:
            compiled = compile_kernels(architecture, toolkit, Path(folder), root)
        rows = [[f"sm_{architecture}", "plan", *(field.name for field in dataclasses.fields(Counts))]]
        for kernel in kernels:
            try:
                rows.append(row_of(kernel, count(kernel, compiled[kernel])))
            except CannotInterpret as error:
                failures.append(f"{kernel.name} on sm_{architecture}: {error}")
        print_table(rows)
        print()
    print("plan: threads of a block / of those a row's / vectors a thread / blocks of a cluster")
    if failures:
        raise SystemExit("\n".join(failures))


def row_of(kernel: Kernel, counts: Counts) -> list[str]:
    shape = (kernel.plan[name] for name in ("threads", "row_threads", "vectors_per_thread", "cluster"))
    numbers = (f"{number:.1f}".removesuffix(".0") for number in dataclasses.astuple(counts))
    return [kernel.name, "/".join(map(str, shape)), *numbers]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]))


if __name__ == "__main__":
    main()
