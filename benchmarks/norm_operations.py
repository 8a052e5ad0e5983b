# SPDX-License-Identifier: BSD-3-Clause
"""What bench_norm.py measures: the operations, their inputs, the bytes they have to move and the check of every output.

A contender's outputs are compared with the float64 reference before it is timed, in blocks of rows, so that the
largest cases can be checked in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from resnorm_ext import reference

EPS = 1e-5
DROPOUT_P = 0.1
BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Operation:
    moves: tuple[str, ...]  # the matrices that must be read or written, by the names of Inputs and outputs
    outputs: tuple[str, ...]
    backward: bool = False
    in_place: bool = False
    dropout: bool = False
    centered: bool = True  # an RMS norm is not, and has no bias

    @property
    def training(self) -> bool:
        return self.backward or self.dropout

    @property
    def adds(self) -> bool:
        return "r" in self.moves or "ds" in self.moves


# y = layer_norm(s) or rms_norm(s), s = r + x; d stands for a gradient.
OPERATIONS = {
    "layer_norm": Operation(("x", "y"), ("y",)),
    "add_layer_norm": Operation(("x", "r", "y"), ("y",)),
    "add_layer_norm in place": Operation(("x", "r", "y"), ("y",), in_place=True),  # y takes x's place
    "add_layer_norm with sum": Operation(("x", "r", "y", "s"), ("y", "s")),
    "dropout_add_layer_norm": Operation(("x", "r", "y", "s"), ("y", "s"), dropout=True),
    "layer_norm backward": Operation(("x", "dy", "dx"), ("dx", "dweight", "dbias"), backward=True),
    "add_layer_norm backward": Operation(
        ("s", "dy", "ds", "dx"),  # the residual's gradient is the input's
        ("dx", "dr", "dweight", "dbias"),
        backward=True,
    ),
    "rms_norm": Operation(("x", "y"), ("y",), centered=False),
    "add_rms_norm": Operation(("x", "r", "y"), ("y",), centered=False),
    "rms_norm backward": Operation(("x", "dy", "dx"), ("dx", "dweight"), backward=True, centered=False),
}

# Largest relative error of a row, and of a weight gradient: PyTorch sums those in the parameters' own precision.
_ROW_LIMITS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_GRADIENT_LIMITS = {torch.float32: 1e-4, torch.float16: 0.25, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Case:
    operation: str
    dtype: str
    rows: int
    columns: int
    residual: str | None = None  # dtype of residual, sum and parameters where it is another
    affine: str = "both"  # which parameters there are: both, weight, bias, neither

    def __str__(self) -> str:
        dtype = f"{self.dtype} + {self.residual} residual" if self.residual else self.dtype
        parameters = "" if self.affine == "both" else f", {self.affine}"
        return f"{self.operation}{parameters}, {dtype}, {self.rows}×{self.columns}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def least_bytes(self) -> int:
        """Each input read once, each output written once; what a kernel keeps for itself does not count."""
        operation, sizes = OPERATIONS[self.operation], {False: self._size(False), True: self._size(True)}
        matrices = sum(sizes[name in ("r", "s", "ds")] for name in operation.moves) * self.rows * self.columns
        vectors = self.has("weight") + self.has("bias")
        if operation.backward:  # the weight is read and each gradient written
            vectors += self.has("weight")
        return matrices + vectors * self.columns * sizes[True]

    def has(self, parameter: str) -> bool:
        return self.affine in ("both", parameter) and (parameter == "weight" or OPERATIONS[self.operation].centered)

    def _size(self, residual: bool) -> int:
        return getattr(torch, (residual and self.residual) or self.dtype).itemsize


@dataclass
class Inputs:
    x: Tensor
    r: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gradients: tuple[Tensor, ...]  # of the outputs

    def arguments(self, operation: Operation) -> tuple:
        """As the operators take them; fresh tensors where the call may write to them."""
        tensors = [self.x, *([self.r] if operation.adds else []), self.weight, self.bias]
        if operation.in_place:
            tensors = [None if tensor is None else tensor.clone() for tensor in tensors]
        if operation.dropout:  # a training step's forward
            tensors = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        *matrices, weight, bias = tensors
        parameters = (weight, bias) if operation.centered else (weight,)
        return (*matrices, tuple(self.x.shape[-1:]), *parameters, EPS)

    def with_both_parameters(self) -> Inputs:
        """The same, with a weight of ones and a bias of zeros where there is none."""
        row = self.x[0]
        weight = torch.ones_like(row) if self.weight is None else self.weight
        bias = torch.zeros_like(row) if self.bias is None else self.bias
        return replace(self, weight=weight, bias=bias)


def make_inputs(case: Case, device: str) -> Inputs:
    operation = OPERATIONS[case.operation]
    dtype, wide = getattr(torch, case.dtype), getattr(torch, case.residual or case.dtype)
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype, device=device)

    shape = (case.rows, case.columns)
    x = draw(*shape, dtype=dtype)
    r = draw(*shape, dtype=wide) if operation.adds else None
    weight = draw(case.columns, dtype=wide) if case.has("weight") else None
    bias = draw(case.columns, dtype=wide) if case.has("bias") else None
    gradients = ()
    if operation.backward:
        gradients = (draw(*shape, dtype=dtype), *([draw(*shape, dtype=wide)] if operation.adds else []))
    return Inputs(x, r, weight, bias, gradients)


def output_names(case: Case) -> tuple[str, ...]:
    missing = {f"d{name}" for name in ("weight", "bias") if not case.has(name)}
    return tuple(name for name in OPERATIONS[case.operation].outputs if name not in missing)


def check(case: Case, inputs: Inputs, outputs: object) -> dict[str, float]:
    """Relative error of each output: of the worst row, or of the whole of a weight gradient. Raises if one is wrong."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # A gradient that was not asked for is None or empty; oneDNN's tensors are opaque.
    outputs = [tensor.detach().to_dense() for tensor in outputs if tensor is not None and tensor.numel()]
    actual = dict(zip(output_names(case), outputs, strict=True))
    errors: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    for rows, expected in _expected(OPERATIONS[case.operation], inputs, actual):
        for name in actual:
            value = expected[name]
            if name in ("dweight", "dbias"):
                sums[name] = sums.get(name, 0) + value
            else:
                error = _relative_error(actual[name][rows], value).max()
                errors[name] = torch.maximum(errors.get(name, error), error)  # unlike max(), keeps a NaN
    errors |= {name: _relative_error(actual[name], value) for name, value in sums.items()}
    for name, error in errors.items():
        limit = (_GRADIENT_LIMITS if name in sums else _ROW_LIMITS)[actual[name].dtype]
        if not error <= limit:
            raise ValueError(f"{name} is wrong: relative error {error:.2g}, limit {limit:.2g}")
    return {name: float(f"{error.item():.3g}") for name, error in errors.items()}


def _relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)


def _expected(
    operation: Operation, inputs: Inputs, actual: dict[str, Tensor]
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Blocks of rows with the reference's outputs; a weight gradient is the block's share of it."""
    count = max(1, BLOCK_ELEMENTS // inputs.x.shape[1])
    block = partial(_expected_gradients if operation.backward else _expected_outputs, operation)
    for first in range(0, inputs.x.shape[0], count):
        rows = slice(first, first + count)
        yield rows, (_expected_after_dropout(inputs, rows, actual) if operation.dropout else block(inputs, rows))


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


def _expected_outputs(operation: Operation, inputs: Inputs, rows: slice) -> dict[str, Tensor]:
    s = _double(inputs.x[rows])
    if inputs.r is not None:
        s = s + _double(inputs.r[rows])
    return {"y": _normalized(operation, s, _double(inputs.weight), _double(inputs.bias)), "s": s}


def _normalized(operation: Operation, s: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if operation.centered:
        return reference.layer_norm(s, s.shape[1:], weight, bias, EPS)
    return reference.rms_norm(s, s.shape[1:], weight, EPS)


@torch.enable_grad()
def _expected_gradients(operation: Operation, inputs: Inputs, rows: slice) -> dict[str, Tensor]:
    tensors = {"dx": inputs.x[rows], "dweight": inputs.weight, "dbias": inputs.bias}
    if inputs.r is not None:
        tensors["dr"] = inputs.r[rows]
    leaves = {name: _double(tensor).requires_grad_() for name, tensor in tensors.items() if tensor is not None}
    s = leaves["dx"] if inputs.r is None else leaves["dx"] + leaves["dr"]
    y = _normalized(operation, s, leaves.get("dweight"), leaves.get("dbias"))
    outputs = (y,) if inputs.r is None else (y, s)
    gradients = [_double(gradient[rows]) for gradient in inputs.gradients]
    return dict(zip(leaves, torch.autograd.grad(outputs, leaves.values(), gradients), strict=True))


def _expected_after_dropout(inputs: Inputs, rows: slice, actual: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each contender draws a mask of its own: it is read off the sum that was returned."""
    x, r, s = _double(inputs.x[rows]), _double(inputs.r[rows]), _double(actual["s"][rows])
    kept = r + x / (1 - DROPOUT_P)
    dropped = (s - r).abs() < (s - kept).abs()
    telling = x.abs() > 0.1  # elsewhere rounding hides which it was
    share, bound = dropped[telling].double().mean(), 6 * math.sqrt(DROPOUT_P / telling.sum().item())
    if not (share - DROPOUT_P).abs() < bound:
        raise ValueError(f"{share:.3f} of the elements were dropped, not {DROPOUT_P}")
    expected = torch.where(dropped, r, kept)
    y = reference.layer_norm(expected, x.shape[1:], _double(inputs.weight), _double(inputs.bias), EPS)
    return {"y": y, "s": expected}
