# SPDX-License-Identifier: BSD-3-Clause
"""LayerNorm and add + LayerNorm, forward and backward, against PyTorch's own: python benchmarks/bench_norm.py"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness import copy_bandwidth, start, time_in_turn, write

from resnorm_ext.functional import add_layer_norm, layer_norm

ROWS = (16, 512, 4096)
COLUMNS = 768
DTYPES = (torch.float32, torch.bfloat16)

Contenders = dict[str, Callable[[], object]]


def cases(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Contenders]]:
    """(name, matrices of rows x columns that must be moved, contenders)."""
    shape = (columns,)
    x, r, grad = (torch.randn(rows, columns).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(columns).to(dtype) for _ in range(2))

    def our_add(x, r, weight, bias):
        return add_layer_norm(x, r, shape, weight, bias)

    def their_add(x, r, weight, bias):
        return F.layer_norm(x + r, shape, weight, bias)

    def our_norm(x, weight, bias):
        return layer_norm(x, shape, weight, bias)

    def their_norm(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias)

    for name, ours, theirs, inputs, forward_streams, backward_streams in (
        ("layer_norm", our_norm, their_norm, (x, weight, bias), 2, 3),
        ("add_layer_norm", our_add, their_add, (x, r, weight, bias), 3, 3),
    ):
        torch.testing.assert_close(ours(*inputs), theirs(*inputs), **_tolerance(dtype))
        yield (
            f"{name} forward",
            forward_streams,
            {"resnorm_ext": _without_grad(ours, inputs), "torch": _without_grad(theirs, inputs)},
        )
        ours_backward, theirs_backward = _backward(ours, inputs, grad), _backward(theirs, inputs, grad)
        torch.testing.assert_close(ours_backward()[0], theirs_backward()[0], **_tolerance(dtype))
        yield f"{name} backward", backward_streams, {"resnorm_ext": ours_backward, "torch": theirs_backward}


def _without_grad(function: Callable, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    def call():
        with torch.no_grad():
            return function(*inputs)

    return call


def _backward(function: Callable, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor) -> Callable[[], tuple]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def _tolerance(dtype: torch.dtype) -> dict[str, float]:
    # torch rounds the sum to bfloat16 before normalising it, ours does not: a few units in the last place.
    return {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}


def main() -> None:
    options = start(__doc__)
    records = []
    print(f"{'case':28}{'dtype':10}{'rows':>6}{'torch µs':>11}{'ours µs':>10}{'ratio':>8}{'of copy':>9}")
    for dtype in DTYPES:
        for rows in ROWS:
            for name, streams, contenders in cases(rows, COLUMNS, dtype):
                least_bytes = streams * rows * COLUMNS * dtype.itemsize
                seconds = time_in_turn(contenders, options.samples)
                roof = copy_bandwidth(least_bytes, options.samples)
                fraction = least_bytes / seconds["resnorm_ext"] / roof
                records.append(
                    {
                        "case": {"name": name, "dtype": str(dtype), "rows": rows, "columns": COLUMNS},
                        "seconds": seconds,
                        "least_bytes": least_bytes,
                        "copy_bytes_per_second": roof,
                    }
                )
                theirs, ours = seconds["torch"], seconds["resnorm_ext"]
                print(
                    f"{name:28}{str(dtype)[6:]:10}{rows:6}{theirs * 1e6:11.1f}{ours * 1e6:10.1f}"
                    f"{theirs / ours:7.2f}×{fraction:9.0%}"
                )
    write(options.output, "norm", records)


if __name__ == "__main__":
    main()
