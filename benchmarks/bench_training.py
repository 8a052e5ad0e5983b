# SPDX-License-Identifier: BSD-3-Clause
"""Training steps, forward and backward: BERT-base's layers in torch.nn, eager and compiled, and accelerated; MiniLM on
real texts as Hugging Face's Trainer pads them, with the optimizer. Beside the layers their limit: the products alone,
each by the fastest backend. Times are taken in turn in one process; peak memory beside the model's by each contender in
a process of its own.

python benchmarks/bench_training.py --output build/bench/training.jsonl
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from harness import environment, parser, start
from results import OURS, Results
from timing import CpuTimer
from torch import nn
from training_cases import COMPILED, DIM, Case, cases, contender_of, encoder_layer, padding_mask

PRODUCTS = "products alone"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--compiled", action="store_true", help="measure torch.compile too, which takes minutes")
    options = start(options.parse_args())
    results = Results(options.output, "training", environment(options))
    timer = CpuTimer(options.samples, seconds=60)
    _check()
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases().values():
            contenders = [name for name in case.contenders if name != COMPILED or options.compiled]
            _compare(results, timer, case, contenders, dtype)


@torch.no_grad()
def _check() -> None:
    """Without dropout both compute the same at real positions."""
    theirs = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False).eval()
    x, padding = torch.randn(*padding_mask().shape, DIM), padding_mask()
    expected = theirs(x, src_key_padding_mask=padding)
    with torch.enable_grad():  # as in training
        output = contender_of(OURS, theirs, "skip")(x, src_key_padding_mask=padding)
    torch.testing.assert_close(output[~padding], expected[~padding], rtol=1e-4, atol=1e-4)


def _compare(results: Results, timer: CpuTimer, case: Case, contenders: list[str], dtype: torch.dtype) -> None:
    peaks = {name: _alone(case, name, dtype) for name in contenders}
    steps = {name: case.make(name, dtype) for name in contenders}
    if case.products is not None:
        steps[PRODUCTS] = case.products(dtype)
    measured = timer.measure(steps, 0)

    dtype_name = "float32" if dtype == torch.float32 else "bfloat16 by autocast"
    described = {"operation": case.name, "dtype": dtype_name, "tokens": case.tokens}
    for name, measurement in measured.items():
        more = {"tokens_per_second": round(case.tokens / measurement.seconds)}
        if name in peaks:
            more["peak_bytes"] = peaks[name]
        results.write(described, name, **measurement.as_dict(), **more)
    ours = measured[OURS].seconds
    print(f"{case.name}, {dtype_name}: {ours * 1e3:.1f} ms, {case.tokens / ours:.0f} tokens/s, ", end="")
    print(f"{peaks[OURS] / 2**20:.0f} MiB", end="")
    for name in contenders[1:]:
        print(f"; {name} {measured[name].seconds / ours:.2f}×, {peaks[name] / peaks[OURS]:.2f}× memory", end="")
    print(f"; {measured[PRODUCTS].seconds / ours:.0%} of the limit" if PRODUCTS in measured else "", flush=True)


def _alone(case: Case, contender: str, dtype: torch.dtype) -> int:
    """Bytes that training takes beside the model, at most, in a process that does nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak_memory, case.name, contender, dtype, torch.get_num_threads()).result()


def _peak_memory(case: str, contender: str, dtype: torch.dtype, threads: int) -> int:
    torch.set_num_threads(threads)
    step = cases()[case].make(contender, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # from here on Linux counts the peak anew
    before = _memory("VmRSS")
    for _ in range(3):
        step()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


if __name__ == "__main__":
    sys.exit(main())
