# SPDX-License-Identifier: BSD-3-Clause
"""Mistakes raise before a kernel is launched, with what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operators.cases import SEED

from resnorm_ext.functional import add_layer_norm, layer_norm, residual_add

from .device import AWAY, DEVICE

pytestmark = pytest.mark.cuda


def x(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> torch.Tensor:
    return torch.ones(shape or (2, 3, 8), device=device).to(dtype)


def away(*shape: int) -> torch.Tensor:
    return x(*shape, device=AWAY)


DROPOUT = {"dropout_p": 0.5, "training": True}
WRONG_DEVICE = {
    "layer_norm, weight": lambda: layer_norm(x(), (8,), away(8)),
    "layer_norm, bias": lambda: layer_norm(x(), (8,), None, away(8)),
    "layer_norm, input": lambda: layer_norm(away(), (8,), x(8)),
    "layer_norm, out": lambda: layer_norm(x(), (8,), out=away(2, 3, 8)),
    "residual_add, residual": lambda: residual_add(x(), away()),
    "residual_add, input": lambda: residual_add(away(), x()),
    "residual_add, input_bias": lambda: residual_add(x(), x(), away(8)),
    "residual_add, seed": lambda: residual_add(x(), x(), seed=SEED.to(AWAY), **DROPOUT),
    "residual_add, out": lambda: residual_add(x(), x(), out=away()),
    "add_layer_norm, residual": lambda: add_layer_norm(x(), away(), (8,)),
    "add_layer_norm, input": lambda: add_layer_norm(away(), x(), (8,)),
    "add_layer_norm, weight": lambda: add_layer_norm(x(), x(), (8,), away(8)),
    "add_layer_norm, bias": lambda: add_layer_norm(x(), x(), (8,), None, away(8)),
    "add_layer_norm, input_bias": lambda: add_layer_norm(x(), x(), (8,), input_bias=away(8)),
    "add_layer_norm, seed": lambda: add_layer_norm(x(), x(), (8,), seed=SEED.to(AWAY), **DROPOUT),
    "add_layer_norm, y": lambda: add_layer_norm(x(), x(), (8,), out=away()),
    "add_layer_norm, s": lambda: add_layer_norm(x(), x(), (8,), prenorm=True, out=(x(), away())),
}
WRONG_SHAPE_OR_DTYPE = {
    "normalized_shape": (lambda: layer_norm(x(), (7,)), "[2, 3, 8]"),
    "weight": (lambda: layer_norm(x(), (8,), x(7)), "[7]"),
    "weight of lower precision": (lambda: layer_norm(x(), (8,), x(8, dtype=torch.bfloat16)), "BFloat16"),
    "weight of another half precision": (
        lambda: layer_norm(x(2, 8, dtype=torch.half), (8,), x(8, dtype=torch.bfloat16)),
        "BFloat16",
    ),
    "residual": (lambda: residual_add(x(), x(2, 3, 1)), "[2, 3, 1]"),
    "input_bias": (lambda: residual_add(x(), x(), x(1)), "[1]"),
    "out": (lambda: residual_add(x(), x(), out=x(2, 3, 7)), "[2, 3, 7]"),
    "out of another dtype": (lambda: layer_norm(x(), (8,), out=x(dtype=torch.float64)), "Double"),
    "s": (lambda: add_layer_norm(x(), x(), (8,), prenorm=True, out=(x(), x(2, 24))), "[2, 24]"),
    "seed": (lambda: residual_add(x(), x(), seed=torch.ones(1, dtype=torch.int64, device=DEVICE), **DROPOUT), "[1]"),
    "float seed": (lambda: add_layer_norm(x(), x(), (8,), seed=x(1)[0], **DROPOUT), "Float"),
}


def error_of(call: Callable) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("call", WRONG_DEVICE.values(), ids=WRONG_DEVICE.keys())
def test_devices(call):
    error = error_of(call)
    assert type(error) is RuntimeError and DEVICE.type in str(error) and AWAY.type in str(error), error


@pytest.mark.parametrize(("call", "got"), WRONG_SHAPE_OR_DTYPE.values(), ids=WRONG_SHAPE_OR_DTYPE.keys())
def test_shapes_and_dtypes(call, got):
    error = error_of(call)
    assert type(error) is RuntimeError and "xpected" in str(error) and got in str(error), error


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_input_that_is_not_floating_point(dtype):
    wrong = x(dtype=dtype)
    for call in (
        lambda: layer_norm(wrong, (8,)),
        lambda: residual_add(x(), wrong),
        lambda: add_layer_norm(wrong, x(), (8,)),
    ):
        error = error_of(call)
        assert type(error) is NotImplementedError and "expected float32, float64, bfloat16 or float16" in str(error)


def test_overlap():
    memory = torch.ones(100, device=DEVICE)
    input, out = memory[:40].view(5, 8), memory[4:44].view(5, 8)
    for call in (
        lambda: layer_norm(input, (8,), out=out),
        lambda: residual_add(input, x(5, 8), out=out),
        lambda: add_layer_norm(x(5, 8), input, (8,), prenorm=True, out=(x(5, 8), out)),
    ):
        assert "memory location" in str(error_of(call))
