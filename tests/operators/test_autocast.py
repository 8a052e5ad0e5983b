# SPDX-License-Identifier: BSD-3-Clause
"""CPU autocast leaves the operators alone, as it does torch's layer_norm, addition and gelu."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm as torch_layer_norm

from resnorm_ext.functional import add_layer_norm, bias_activation, layer_norm, residual_add

from .cases import DTYPES, FULL_CASES, HALVES, require_grad


@pytest.mark.parametrize("autocast", HALVES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=str)
def test_layer_norm_as_torchs(autocast, dtype, parameters):
    if parameters is not None and dtype not in HALVES:
        pytest.skip("no mixed types")
    input, weight = torch.randn(3, 8).to(dtype), torch.randn(8).to(parameters or dtype)
    with torch.autocast("cpu", autocast):
        expected = torch_layer_norm(input, (8,), weight)
        output = layer_norm(input, (8,), weight)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("autocast", HALVES, ids=str)
@pytest.mark.parametrize("residual", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_add_and_the_sum_are_torchs_addition(autocast, residual, dtype):
    input, residual = torch.randn(3, 8).to(dtype), torch.randn(3, 8).to(residual)
    with torch.autocast("cpu", autocast):
        expected = input + residual
        assert residual_add(input, residual).dtype == expected.dtype
        y, s = add_layer_norm(input, residual, (8,), prenorm=True)
    assert (y.dtype, s.dtype) == (dtype, expected.dtype)


@pytest.mark.parametrize("autocast", HALVES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_as_torchs(autocast, dtype):
    input = torch.randn(3, 8).to(dtype)
    with torch.autocast("cpu", autocast):
        expected, output = torch.nn.functional.gelu(input), bias_activation(input)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_training_step(case):
    """A linear layer in bfloat16 before the operator, float32 parameters and stream: every gradient comes back."""
    inputs = require_grad(case.make_inputs((4, 8)))
    linear = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = linear(inputs["input"])
        assert hidden.dtype == torch.bfloat16
        outputs = case.ours(inputs | {"input": hidden})
    sum(output.float().square().sum() for output in outputs).backward()
    for leaf in (*inputs.values(), *linear.parameters()):
        assert leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all()


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_out(case):
    inputs = case.make_inputs((4, 8))
    expected = case.ours(inputs)
    outs = tuple(torch.empty(4, 8) for _ in expected)
    with torch.autocast("cpu", torch.bfloat16):
        case.ours(inputs, out=outs if case.prenorm else outs[0])
    assert all(torch.equal(out, value) for out, value in zip(outs, expected, strict=True))
