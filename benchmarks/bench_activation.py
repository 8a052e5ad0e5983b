# SPDX-License-Identifier: BSD-3-Clause
"""bias + GELU, in both forms, and bias + ReLU on the CPU, forward and backward, against PyTorch, eager and compiled.

python benchmarks/bench_activation.py --output build/bench/activation.jsonl
python benchmarks/report.py build/bench/*.jsonl
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product, starmap

import norm_operations
import torch
import torch.nn.functional as F
from harness import environment, parser, start
from norm_contenders import COMPILED, Call, compiled
from results import COPY, OURS, Results
from timing import CpuTimer, timer_for
from torch import Tensor

from resnorm_ext import reference
from resnorm_ext.functional import bias_activation

TORCHS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
DTYPES, ROWS, COLUMNS = ("float32", "bfloat16"), (1, 32, 512, 4096), (1536, 3072)
# Of the largest value: PyTorch rounds input + bias to the dtype, and sums its gradient in it.
LARGEST_ERRORS = {"float32": 1e-5, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Case:
    activation: str
    backward: bool
    dtype: str
    rows: int
    columns: int

    def __str__(self) -> str:
        return str(self.kept_as)

    @property
    def kept_as(self) -> norm_operations.Case:
        """The form that results are kept in."""
        operation = f"bias + {self.activation}{' backward' * self.backward}"
        return norm_operations.Case(operation, self.dtype, self.rows, self.columns)

    def least_bytes(self) -> int:
        """Each input read once, each output written once."""
        matrices, vectors = (3, 2) if self.backward else (2, 1)
        return (matrices * self.rows + vectors) * self.columns * getattr(torch, self.dtype).itemsize


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="", help="the cases that this regular expression finds, as they are printed")
    options = start(options.parse_args())
    torch.manual_seed(0)
    results = Results(options.output, "activation", environment(options))
    timer = timer_for("cpu", options.samples)
    for case in starmap(Case, product(TORCHS, (False, True), DTYPES, ROWS, COLUMNS)):
        if re.search(options.only, str(case)):
            with torch.set_grad_enabled(case.backward):
                measure(case, timer, results)


def measure(case: Case, timer: CpuTimer, results: Results) -> None:
    """Every contender's output is checked before it is timed."""
    dtype = getattr(torch, case.dtype)
    input, grad = torch.randn(2, case.rows, case.columns).to(dtype)
    bias = torch.randn(case.columns).to(dtype)
    calls, errors = {}, {}
    for name, bind in contenders(case.activation).items():
        calls[name] = call = with_backward(bind, input, bias, grad) if case.backward else bind(input, bias)
        errors[name] = check(case, call(), expected(case, input, bias, grad))
    calls[COPY] = timer.copy(case.least_bytes())
    measured = timer.measure(calls, case.least_bytes())
    for name, measurement in measured.items():
        error = {"error": errors[name]} if name in errors else {}
        results.write(case.kept_as.as_dict(), name, **measurement.as_dict(), **error, least_bytes=case.least_bytes())
    print(f"{case!s:50}", *(f"{name} {m.seconds * 1e6:.1f}" for name, m in measured.items()), "µs", flush=True)


def contenders(activation: str) -> dict[str, Callable[..., Call]]:
    """Ours comes first, before memory holds a right answer."""

    def torchs(input: Tensor, bias: Tensor) -> Tensor:
        return TORCHS[activation](input + bias)

    def direct(function: Callable) -> Callable[..., Call]:
        return lambda *arguments: partial(function, *arguments)

    ours = partial(bias_activation, activation=activation)
    return {OURS: direct(ours), "torch": direct(torchs), COMPILED: compiled(torchs, "cpu")}


def with_backward(bind: Callable[..., Call], input: Tensor, bias: Tensor, grad: Tensor) -> Call:
    """What autograd makes of a forward."""
    leaves = [input.detach().requires_grad_(), bias.detach().requires_grad_()]
    output = bind(*leaves)()
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def expected(case: Case, input: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [input.double().requires_grad_(case.backward), bias.double().requires_grad_(case.backward)]
    output = reference.bias_activation(*leaves, case.activation)
    return torch.autograd.grad(output, leaves, grad.double()) if case.backward else (output,)


def check(case: Case, actual: Tensor | tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest error of any output, as a share of that output's largest value. Raises where it is too large."""
    actual = (actual,) if isinstance(actual, Tensor) else actual
    errors = [((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)]
    if not max(errors) <= LARGEST_ERRORS[case.dtype]:  # nor is NaN
        raise ValueError(f"{case}: wrong by {max(errors)}")
    return max(errors)


if __name__ == "__main__":
    sys.exit(main())
