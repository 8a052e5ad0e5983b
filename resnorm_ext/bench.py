# SPDX-License-Identifier: BSD-3-Clause
"""How much faster this package is than PyTorch on this machine: norms, residual-add and an encoder layer, forward and
backward. Both take turns, and a figure is the median of their ratios; malloc keeps its pages, so that neither pays for
fresh ones. Nothing else should be running meanwhile."""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .integrations import accelerate

_DTYPES = (torch.float32, torch.bfloat16)
_ROWS, _COLUMNS = (512, 8192), 768
_SHORTEST = 2e-3  # seconds: shorter calls are repeated
_EPS = 1e-5


@dataclass(frozen=True)
class Result:
    work: str
    dtype: str
    device: str
    ratio: float  # how many times as long PyTorch takes
    ours_microseconds: float
    torch_microseconds: float


Call = Callable[[], object]
Pair = tuple[Call, Call]  # ours, PyTorch's


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m resnorm_ext bench", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--samples", type=int, default=15, help="of each, after one that does not count (default: 15)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios into this file (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f"argument --device: {options.device}: {str(error).splitlines()[0]}")
    if options.samples < 1:
        parser.error(f"argument --samples: expected at least 1, but got {options.samples}")
    if options.plot:
        if find_spec("matplotlib") is None:
            parser.error("argument --plot: there is no matplotlib; type: pip install matplotlib")
        if not options.plot.absolute().parent.is_dir() or options.plot.suffix not in (".png", ".svg", ".pdf"):
            parser.error(
                f"argument --plot: expected a .png, .svg or .pdf in a folder that exists, but got {options.plot}"
            )
    results = []
    for result in measure(device, options.samples):
        results.append(result)
        if not options.json:
            print(
                f"{result.work:48} {result.dtype:9} {result.ratio:6.2f}×  "
                f"{result.ours_microseconds:10.1f} µs, PyTorch {result.torch_microseconds:10.1f} µs",
                flush=True,
            )
    if options.json:
        machine = {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
        print(json.dumps({**machine, "results": [asdict(result) for result in results]}, indent=2))
    if options.plot:
        draw(results, options.plot)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0


def measure(device: torch.device, samples: int) -> Iterator[Result]:
    keep_pages()
    for dtype in _DTYPES:
        for work, (ours, theirs) in works(device, dtype):
            our_seconds, their_seconds = take_turns((ours, theirs), samples, device)
            ratio = statistics.median(b / a for a, b in zip(our_seconds, their_seconds, strict=True))
            medians = (statistics.median(each) * 1e6 for each in (our_seconds, their_seconds))
            yield Result(work, str(dtype).removeprefix("torch."), str(device), ratio, *medians)


def keep_pages() -> None:
    """Has malloc keep what is freed. Else fresh pages for a result cost more than the kernel that fills it, and which
    of the two pays for them is chance. Nothing where the C library is not glibc."""
    mmap_max, trim_threshold = -4, -1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def works(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Pair]]:
    """What is measured, in this dtype."""
    for rows in _ROWS:
        for work, pair in norms(rows, device, dtype):
            yield f"{work}, {rows} × {_COLUMNS}", pair
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(_COLUMNS, 12, 4 * _COLUMNS, 0.1, "gelu", batch_first=True)
    layers = stock.to(device, dtype), accelerate(copy.deepcopy(stock).to(device, dtype), padding="skip")
    tokens = torch.randn(8, 128, _COLUMNS, device=device, dtype=dtype)
    lengths = torch.tensor([128, 90, 70, 64, 50, 40, 30, 20], device=device)
    padding = torch.arange(128, device=device) >= lengths.unsqueeze(1)
    theirs, ours = (_inference(layer, tokens, padding) for layer in layers)
    yield "encoder layer, inference, half padding, skipped", (ours, theirs)
    theirs, ours = (_training(layer, tokens) for layer in layers)
    yield "encoder layer, training step", (ours, theirs)


def norms(rows: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Pair]]:
    x, residual, gradient = (torch.randn(rows, _COLUMNS, device=device, dtype=dtype) for _ in range(3))
    weight, bias = (torch.randn(_COLUMNS, device=device, dtype=dtype) for _ in range(2))
    norm = ((_COLUMNS,), weight, bias, _EPS)
    yield "layer_norm", (partial(functional.layer_norm, x, *norm), partial(F.layer_norm, x, *norm))
    ours, theirs = (partial(function, x, residual, *norm) for function in (functional.add_layer_norm, _torch_add))
    yield "add, layer_norm", (ours, theirs)
    rms_norm = ((_COLUMNS,), weight, _EPS)
    yield "rms_norm", (partial(functional.rms_norm, x, *rms_norm), partial(F.rms_norm, x, *rms_norm))
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
    steps = (partial(_step, function, leaves, gradient) for function in (functional.layer_norm, F.layer_norm))
    yield "layer_norm, forward and backward", tuple(steps)


def _torch_add(x: Tensor, residual: Tensor, *norm: object) -> Tensor:
    return F.layer_norm(x + residual, *norm)


def _step(function: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    x, weight, bias = leaves
    return torch.autograd.grad(function(x, (_COLUMNS,), weight, bias, _EPS), leaves, gradient)


def _inference(layer: nn.Module, tokens: Tensor, padding: Tensor) -> Call:
    def call() -> Tensor:
        layer.eval()
        with torch.no_grad():
            return layer(tokens, src_key_padding_mask=padding)

    return call


def _training(layer: nn.Module, tokens: Tensor) -> Call:
    layer.train()
    return lambda: torch.autograd.grad(layer(tokens).sum(), list(layer.parameters()))


def take_turns(calls: Pair, samples: int, device: torch.device) -> list[list[float]]:
    """Seconds of each call, sample by sample; before each one call that does not count: the other's has left the
    caches."""

    def seconds(call: Call, times: int) -> float:
        _wait(device)
        began = time.perf_counter()
        for _ in range(times):
            call()
        _wait(device)
        return (time.perf_counter() - began) / times

    repeats = []
    for call in calls:
        for _ in range(3):
            call()
        repeats.append(max(1, round(_SHORTEST / seconds(call, 1))))
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(samples):
        for call, times, into in zip(calls, repeats, taken, strict=True):
            call()
            into.append(seconds(call, times))
    return taken


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw(results: list[Result], path: Path) -> None:
    """A bar for each piece of work: how many times as long PyTorch takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    works = list(dict.fromkeys(result.work for result in results))
    dtypes = list(dict.fromkeys(result.dtype for result in results))
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(works) + 1.5), layout="constrained")
    height = 0.8 / len(dtypes)
    for index, dtype in enumerate(dtypes):
        ratios = {result.work: result.ratio for result in results if result.dtype == dtype}
        places = [place + (index - (len(dtypes) - 1) / 2) * height for place in range(len(works))]
        bars = axes.barh(places, [ratios[work] for work in works], height, label=dtype)
        axes.bar_label(bars, fmt="%.2f×", padding=3, fontsize=8)
    axes.axvline(1.0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(works)), works)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"time of PyTorch {torch.__version__} over time of resnorm_ext, {results[0].device}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
