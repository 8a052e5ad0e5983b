# SPDX-License-Identifier: BSD-3-Clause
"""Autocast does with the norms what it does with torch's layer_norm, and with the sum what it does with an addition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators.cases import DTYPES, FULL_NORM_CASES, HALVES, require_grad

from resnorm_ext.functional import add_layer_norm, layer_norm, residual_add

from .device import DEVICE, seed_at, to_device

pytestmark = pytest.mark.cuda

F64 = torch.float64


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(DEVICE.type, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("input", DTYPES, ids=str)
def test_layer_norm_as_torchs(input, parameters, dtype):
    """Any dtypes go together, as all become float32; float64 stays what it is."""
    if (input == F64) != (parameters == F64):
        pytest.skip("torch's layer_norm does not take these")
    x, weight, bias = torch.randn(3, 768).to(input), *torch.randn(2, 768).to(parameters)
    x, weight, bias = to_device((x, weight, bias))
    with autocast(dtype):
        expected = F.layer_norm(x, (768,), weight, bias)
        output = layer_norm(x, (768,), weight, bias)
    assert output.dtype == expected.dtype == (F64 if input == F64 else torch.float32)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("residual_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("residual", DTYPES, ids=str)
@pytest.mark.parametrize("input", DTYPES, ids=str)
def test_add_layer_norm_and_residual_add(input, residual, residual_dtype, dtype):
    x, r = to_device((torch.randn(3, 768).to(input), torch.randn(3, 768).to(residual)))
    with autocast(dtype):
        y, s = add_layer_norm(x, r, (768,), prenorm=True, residual_dtype=residual_dtype)
        assert residual_add(x, r, residual_dtype=residual_dtype).dtype == (residual_dtype or (x + r).dtype)
    assert y.dtype == (F64 if input == F64 else torch.float32)
    assert s.dtype == (residual_dtype or (F64 if F64 in (input, residual) else torch.float32))
    torch.testing.assert_close(s.double(), (x.double() + r.double()).to(s.dtype).double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_training_step(case, dtype):
    """A linear layer in half precision before the operator, float32 parameters: every gradient comes back."""
    inputs = require_grad(to_device(case.make_inputs((4, 768))))
    linear = torch.nn.Linear(768, 768, device=DEVICE)
    with autocast(dtype):
        hidden = linear(inputs["input"])
        assert hidden.dtype == dtype
        outputs = case.ours(inputs | {"input": hidden}, seed=seed_at(inputs))
    sum(output.square().sum() for output in outputs).backward()
    for leaf in (*inputs.values(), *linear.parameters()):
        assert leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all()


@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_out_is_written_as_without(case):
    inputs = to_device(case.make_inputs((4, 768), torch.bfloat16))
    expected = case.ours(inputs, seed=seed_at(inputs))
    outs = tuple(torch.empty_like(value) for value in expected)
    with autocast(torch.float16):
        case.ours(inputs, seed=seed_at(inputs), out=outs if case.prenorm else outs[0])
    assert all(torch.equal(out, value) for out, value in zip(outs, expected, strict=True))
