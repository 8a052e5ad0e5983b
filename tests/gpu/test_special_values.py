# SPDX-License-Identifier: BSD-3-Clause
"""Rows far from zero, constant ones, NaN and Inf, and how accurate we are beside PyTorch's kernels on this device."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from operators.cases import DTYPES, HALVES, eps_of

from resnorm_ext.functional import add_layer_norm, layer_norm, residual_add

from .device import DEVICE

pytestmark = pytest.mark.cuda

COLUMNS = [7, 768, 4099, 20480, 140000]


@pytest.mark.parametrize("base", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("cols", COLUMNS)
def test_rows_far_from_zero(cols, base):
    grad = torch.randn(4, cols, device=DEVICE)
    for sign in (1, -1):
        x = (sign * (torch.randn(4, cols, device=DEVICE) + base)).requires_grad_()
        exact = x.detach().double().requires_grad_()
        y, expected = layer_norm(x, (cols,)), F.layer_norm(exact, (cols,))
        assert (y.double() - expected).abs().max() < 2e-6
        gradients = torch.autograd.grad(y, x, grad) + torch.autograd.grad(expected, exact, grad.double())
        assert (gradients[0].double() - gradients[1]).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("cols", [1, 41, 1128, 8437, *COLUMNS])
def test_constant_rows_give_exactly_the_bias(dtype, cols):
    values = torch.tensor([0.0, 1.0, -0.1, 1e4 / 3, 3e4, 1e-30], device=DEVICE).to(dtype)
    weight, bias = torch.randn(2, cols, device=DEVICE).to(dtype)
    output = layer_norm(values[:, None].expand(-1, cols).contiguous(), (cols,), weight, bias)
    assert torch.equal(output, bias.expand_as(output))


def test_large_float16_values():
    x = (torch.randn(8, 3000, device=DEVICE) * 2e4).clamp(-6e4, 6e4).half()
    torch.testing.assert_close(layer_norm(x, (3000,)).double(), F.layer_norm(x.double(), (3000,)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLUMNS)
def test_nan_and_inf_go_where_torchs_do(dtype, cols):
    x, r = torch.randn(6, cols, device=DEVICE).to(dtype), torch.randn(6, cols, device=DEVICE).to(dtype)
    for row, value in enumerate((math.inf, -math.inf, math.nan)):
        x[row, (0, cols // 2, cols - 1)[row]] = value
    r[3, 0], r[4, cols - 1] = math.inf, math.nan
    assert torch.equal(residual_add(x, r).nan_to_num(7.0), (x + r).nan_to_num(7.0))
    y, s = add_layer_norm(x, r, (cols,), prenorm=True)
    assert torch.equal(s.nan_to_num(7.0), (x + r).nan_to_num(7.0))
    assert torch.equal(y.isnan(), F.layer_norm((x + r).double(), (cols,)).isnan())
    assert torch.equal(layer_norm(x, (cols,)).isnan(), F.layer_norm(x.double(), (cols,)).isnan())


SEEDS = 100


def outputs_and_gradients(adds: bool, ours: bool, dtype: torch.dtype, tensors, grad) -> list[torch.Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    x, r, weight, bias = leaves
    if ours:
        y = add_layer_norm(x, r, x.shape[-1:], weight, bias) if adds else layer_norm(x, x.shape[-1:], weight, bias)
    else:
        y = F.layer_norm(x + r if adds else x, x.shape[-1:], weight, bias)
    leaves = leaves if adds else [x, weight, bias]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


@pytest.mark.parametrize("shape", [(4, 768), (16, 37), (2, 3001), (257, 64), (300, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("adds", [False, True], ids=["layer_norm", "add_layer_norm"])
def test_no_less_accurate_than_torch(adds, dtype, shape):
    """Mean of the RMS error over seeds at most 1.05 times torch's; on no seed worse than 3 times or 2 ulp."""
    rms, worst, sizes = [], [], []
    for seed in range(SEEDS):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        vectors = [shape, shape, shape[-1:], shape[-1:], shape]
        tensors = [torch.randn(size, generator=generator, device=DEVICE).to(dtype) for size in vectors]
        exact = outputs_and_gradients(adds, False, torch.float64, tensors[:-1], tensors[-1])
        errors = [
            [result.double() - truth for result, truth in zip(results, exact, strict=True)]
            for results in (
                outputs_and_gradients(adds, ours, dtype, tensors[:-1], tensors[-1]) for ours in (True, False)
            )
        ]
        rms.append(torch.stack([torch.stack([e.square().mean().sqrt() for e in side]) for side in errors]))
        worst.append(torch.stack([torch.stack([e.abs().max() for e in side]) for side in errors]))
        sizes.append(torch.stack([truth.abs().max() for truth in exact]))
    ours, theirs = torch.stack(worst, 1)
    assert (ours <= torch.maximum(3 * theirs, 2 * eps_of(dtype) * torch.stack(sizes))).all()
    ours, theirs = torch.stack(rms, 1).mean(1)
    assert (ours <= 1.05 * theirs).all(), (ours / theirs).tolist()
