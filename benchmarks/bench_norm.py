# SPDX-License-Identifier: BSD-3-Clause
"""LayerNorm and RMSNorm, alone, after add and after dropout + add, forward and backward, against everybody else's.

python benchmarks/bench_norm.py --output build/bench/norm.jsonl
python benchmarks/bench_norm.py --device cuda --time-limit 240 --output build/bench/norm-cuda.jsonl
python benchmarks/report.py build/bench/*.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from harness import environment, parser, start
from norm_accuracy import row_accuracy
from norm_contenders import COMPILED, WITH_BOTH, Call, contenders
from norm_operations import OPERATIONS, Case, check, make_inputs
from results import COPY, OURS, Results
from timing import CpuTimer, CudaTimer, timer_for

K = 1024
F32, BF16, F16 = "float32", "bfloat16", "float16"
MIXED = "bfloat16 + float32"  # the dtypes of input and residual


class Grid(NamedTuple):
    """Every combination is a case."""

    operation: str
    dtypes: tuple[str, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    affine: tuple[str, ...] = ("both",)


CPU_ROWS, CPU_COLUMNS = (1, 32, 512, 4 * K, 16 * K), (256, 768, K, 4 * K)
FEWER_PARAMETERS = ("weight", "bias", "neither")
CPU_GRIDS = [
    Grid("layer_norm", (F32, BF16, F16), CPU_ROWS, CPU_COLUMNS),
    Grid("add_layer_norm", (F32, BF16), CPU_ROWS, CPU_COLUMNS),
    Grid("add_layer_norm in place", (F32, BF16), CPU_ROWS, CPU_COLUMNS),
    Grid("dropout_add_layer_norm", (F32, BF16), CPU_ROWS, CPU_COLUMNS),
    Grid("layer_norm backward", (F32, BF16), CPU_ROWS, CPU_COLUMNS),
    Grid("add_layer_norm backward", (F32, BF16), CPU_ROWS, CPU_COLUMNS),
    Grid("rms_norm", (F32, BF16), CPU_ROWS, CPU_COLUMNS),
    Grid("add_rms_norm", (F32, BF16), CPU_ROWS, CPU_COLUMNS),
    Grid("rms_norm backward", (F32, BF16), CPU_ROWS, CPU_COLUMNS),
    # Short rows where the second cache ends and the third does.
    Grid("layer_norm", (F32, BF16), (2 * K, 8 * K), (256, 512)),
    Grid("layer_norm backward", (F32, BF16), (2 * K, 8 * K), (256, 512)),
    Grid("layer_norm backward", (F32, BF16), (4 * K,), (512,)),
    Grid("layer_norm", (F32,), (512, 4 * K), (768,), FEWER_PARAMETERS),
    Grid("layer_norm backward", (F32,), (512, 4 * K), (768,), FEWER_PARAMETERS),
]
CPU_QUICK_GRIDS = [Grid(operation, (F32, BF16), (1, 512, 4 * K), (768,)) for operation in OPERATIONS]
CUDA_GRIDS = [
    Grid("layer_norm", (BF16,), (32 * K,), (256, 512, 768, K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K)),
    Grid("layer_norm", (F32,), (4 * K,), (K, 4 * K, 16 * K)),
    Grid("layer_norm backward", (BF16,), (32 * K,), (K, 2 * K, 4 * K, 8 * K, 16 * K)),
    Grid("layer_norm backward", (F32,), (4 * K,), (4 * K, 8 * K, 16 * K)),
    Grid("add_layer_norm with sum", (BF16, F32, MIXED), (16 * K,), (768, K, 4 * K, 8 * K)),
    Grid("add_layer_norm backward", (F32,), (2 * K,), (8 * K, 16 * K, 32 * K)),
    Grid("layer_norm", (BF16,), (1, 16, 64), (4 * K,)),
    Grid("dropout_add_layer_norm", (BF16,), (16 * K,), (768, K, 4 * K, 8 * K)),
    Grid("layer_norm", (BF16,), (32 * K,), (760, 1000, 1128, 3840, 5120, 12288, 20480)),
    Grid("layer_norm", (BF16,), (32 * K,), (761, 1001, 4095)),
]
CUDA_QUICK_GRIDS = [
    Grid("layer_norm", (BF16,), (32 * K,), (K, 8 * K)),
    Grid("layer_norm", (BF16,), (16,), (4 * K,)),
    Grid("layer_norm backward", (BF16,), (32 * K,), (4 * K,)),
    Grid("add_layer_norm with sum", (BF16,), (16 * K,), (4 * K,)),
    Grid("dropout_add_layer_norm", (BF16,), (16 * K,), (4 * K,)),
]
GRIDS = {("cpu", False): CPU_GRIDS, ("cpu", True): CPU_QUICK_GRIDS}
GRIDS |= {("cuda", False): CUDA_GRIDS, ("cuda", True): CUDA_QUICK_GRIDS}

# Compiling takes seconds a case: on the CPU it is done where a goal asks for it, on CUDA after everything else.
CPU_COMPILED = [("layer_norm", F32, "both"), ("add_layer_norm", F32, "both")]

LARGE_COPY_BYTES = 1 << 33  # far larger than any cache


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--quick", action="store_true", help="a brief grid")
    options.add_argument("--only", default="", help="the cases that this regular expression finds, as they are printed")
    options.add_argument("--time-limit", type=float, default=float("inf"), help="no new case after so many seconds")
    options = start(options.parse_args())
    deadline = time.monotonic() + options.time_limit
    torch.manual_seed(0)

    timer = timer_for(options.device, options.samples)
    where = environment(options, options.device)
    if options.device == "cuda":
        where["large_copy_bytes_per_second"] = round(_large_copy(timer))
    bench = Bench(options, timer, Results(options.output, "norm", where))
    for case, contender, errors in row_accuracy(options.device):
        bench.results.write(case, contender, **errors)

    grid = [case for case in cases(options.device, options.quick) if re.search(options.only, str(case))]
    passes = (False,) if options.device == "cpu" else (False, True)
    rounds = [(case, compiled_alone) for compiled_alone in passes for case in grid]
    with onnxruntime_worker(options) as bench.onnxruntime:
        for done, (case, compiled_alone) in enumerate(rounds):
            if time.monotonic() > deadline:
                print(f"stopped at the time limit: {done} of {len(rounds)} cases")
                break
            bench.run(case, compiled_alone)
    return bench.wrong > 0


def cases(device: str, quick: bool) -> Iterator[Case]:
    for grid in GRIDS[device, quick]:
        for affine, dtypes, rows, columns in product(grid.affine, grid.dtypes, grid.rows, grid.columns):
            dtype, _, residual = dtypes.partition(" + ")
            yield Case(grid.operation, dtype, rows, columns, residual or None, affine)


class Bench:
    """Measures cases and writes each result as soon as it is there."""

    def __init__(self, options: argparse.Namespace, timer: CpuTimer | CudaTimer, results: Results):
        self.device, self.timer, self.results = options.device, timer, results
        self.compiled = [] if options.isa else CPU_COMPILED
        self.onnxruntime: subprocess.Popen | None = None
        self.wrong = 0  # cases in which ours failed

    def run(self, case: Case, compiled_alone: bool) -> None:
        with torch.set_grad_enabled(OPERATIONS[case.operation].training), self.timer.context():
            calls, errors = self._checked(case, compiled_alone)
            if not compiled_alone:
                calls[COPY] = self.timer.copy(case.least_bytes())
            try:
                measured = self.timer.measure(calls, case.least_bytes())
            except RuntimeError as error:  # out of memory
                self._write(case, OURS, {"failed": _one_line(error)})
                return
        figures = {name: measurement.as_dict() for name, measurement in measured.items()}
        if self.onnxruntime and (answer := self._ask_onnxruntime(case)):
            figures["onnxruntime"] = answer
        for name, values in figures.items():
            self._write(case, name, {**values, **({"errors": errors[name]} if name in errors else {})})
        seconds = [f"{name} {values['seconds'] * 1e6:.1f}" for name, values in figures.items() if "seconds" in values]
        print(f"{case!s:60}", *seconds, "µs", flush=True)

    def _checked(self, case: Case, compiled_alone: bool) -> tuple[dict[str, Call], dict[str, dict[str, float]]]:
        """The contenders whose outputs are right, with their errors."""
        inputs = make_inputs(case, self.device)
        calls, errors = {}, {}
        binds = contenders(case, self.device, inputs.gradients)
        if case.affine != "both":  # whose outputs are checked in the case of both
            calls[WITH_BOTH] = binds[OURS](*inputs.with_both_parameters().arguments(OPERATIONS[case.operation]))
        for name, bind in binds.items():
            if not self._takes_part(case, name, compiled_alone):
                continue
            try:
                call = bind(*inputs.arguments(OPERATIONS[case.operation]))
                errors[name] = check(case, inputs, call())
                calls[name] = call
            except Exception as error:  # whatever a peer does, the others are measured
                self._write(case, name, {"failed": _one_line(error)})
        return calls, errors

    def _takes_part(self, case: Case, name: str, compiled_alone: bool) -> bool:
        if self.device == "cuda":
            return (name == COMPILED) == compiled_alone
        return name != COMPILED or (case.operation, case.dtype, case.affine) in self.compiled

    def _write(self, case: Case, contender: str, values: dict[str, object]) -> None:
        if "failed" in values:
            print(f"{case}: {contender} failed: {values['failed']}", file=sys.stderr)
            self.wrong += contender == OURS
        self.results.write(case.as_dict(), contender, **values, least_bytes=case.least_bytes())

    def _ask_onnxruntime(self, case: Case) -> dict[str, object] | None:
        self.onnxruntime.stdin.write(json.dumps(case.as_dict()) + "\n")
        if line := self.onnxruntime.stdout.readline():
            return json.loads(line)
        self.onnxruntime = None
        return {"failed": "its process ended"}


@contextlib.contextmanager
def onnxruntime_worker(options: argparse.Namespace) -> Iterator[subprocess.Popen | None]:
    if options.device != "cpu" or options.isa or not (find_spec("onnxruntime") and find_spec("onnx")):
        yield None
        return
    command = [sys.executable, str(Path(__file__).with_name("onnxruntime_worker.py"))]
    command += ["--threads", str(options.threads), "--samples", str(options.samples)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as worker:
        yield worker
        worker.stdin.close()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _large_copy(timer: CudaTimer) -> float:
    """What the device's memory gives, in bytes per second."""
    with timer.context():
        copy = timer.copy(LARGE_COPY_BYTES)
        return LARGE_COPY_BYTES / timer.measure({COPY: copy}, LARGE_COPY_BYTES)[COPY].seconds


if __name__ == "__main__":
    sys.exit(main())
