# SPDX-License-Identifier: BSD-3-Clause
"""The mask is the CPU kernels' and the formula's, bit for bit, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from operators.cases import DTYPES
from operators.layouts import lay_out

from resnorm_ext import reference
from resnorm_ext.functional import add_layer_norm, residual_add

from .device import COLUMNS, DEVICE

pytestmark = pytest.mark.cuda

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 2**32 - 1, 0x1234_5678_9ABC_DEF0]
OPERATORS = {
    "residual_add": residual_add,
    "add_layer_norm": lambda input, residual, **options: add_layer_norm(
        input, residual, input.shape[-1:], prenorm=True, **options
    )[1],
}


@pytest.fixture(params=OPERATORS.values(), ids=OPERATORS.keys())
def sum_of(request):
    return request.param


def ones_and_gradient(sum_of, shape, dtype, p, seed, device, layout="contiguous") -> list[torch.Tensor]:
    """The sum of ones and zeros, and its gradient: the scale where an element is kept, and zero."""
    input = lay_out(torch.ones(shape, dtype=dtype, device=device), layout).requires_grad_()
    residual = lay_out(torch.zeros(shape, dtype=dtype, device=device), layout)
    s = sum_of(input, residual, dropout_p=p, training=True, seed=torch.tensor(seed, device=device))
    return [s.detach().cpu(), torch.autograd.grad(s, input, torch.ones_like(s))[0].cpu()]


@pytest.mark.parametrize("cols", [1, *COLUMNS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_lengths(sum_of, dtype, cols):
    for layout in ("contiguous", "offset", "row strided"):
        shape = (5, cols) if cols < 100_000 else (2, cols)
        there = ones_and_gradient(sum_of, shape, dtype, 0.3, 77, DEVICE, layout)
        here = ones_and_gradient(sum_of, shape, dtype, 0.3, 77, "cpu")
        keep = reference.dropout_keep_mask(torch.tensor(77), shape, 0.3)
        for ours, cpus in zip(there, here, strict=True):
            assert torch.equal(ours, cpus) and torch.equal(ours != 0, keep)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [1e-6, 7.7e-6, 0.1, 0.5, 0.99999, 0.999995, 1.0])
def test_seeds_and_rates(sum_of, p, seed):
    for shape in [(7, 33), (4, 1024), (2, 3, 5000)]:
        there, here = (ones_and_gradient(sum_of, shape, torch.float32, p, seed, device) for device in (DEVICE, "cpu"))
        assert all(torch.equal(ours, cpus) for ours, cpus in zip(there, here, strict=True))


def test_a_mask_of_many_rows(sum_of):
    shape = (5003, 333)
    s, gradient = ones_and_gradient(sum_of, shape, torch.float32, 0.5, -5, DEVICE)
    keep = reference.dropout_keep_mask(torch.tensor(-5), shape, 0.5)
    assert torch.equal(s != 0, keep) and torch.equal(gradient != 0, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.3, 0.999995, 1.0])
def test_dropped_values_contribute_nothing_whatever_they_are(sum_of, p, dtype):
    """A rate that rounds to 1 gives exactly the residual, and zero gradients."""
    for cols in (40, 1000, 5000, 140000):
        shape, seed = (2, cols), torch.tensor(9, device=DEVICE)
        keep = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
        if reference.dropout_threshold(p) < 65536:
            keep = reference.dropout_keep_mask(seed, shape, p)
        values = torch.tensor([math.inf, -math.inf, math.nan], device=DEVICE).to(dtype)
        input = values[torch.arange(2 * cols, device=DEVICE) % 3].view(shape).masked_fill(keep, 0.0).requires_grad_()
        residual = torch.randn(shape, device=DEVICE).to(dtype)
        s = sum_of(input, residual, dropout_p=p, training=True, seed=seed)
        assert torch.equal(s, residual)
        grad = torch.full_like(s, math.inf).masked_fill(keep, 1.0)
        (gradient,) = torch.autograd.grad(s, input, grad)
        expected = keep.to(dtype) * reference.dropout_scale(p) if keep.any() else torch.zeros_like(gradient)
        assert torch.equal(gradient, expected.to(dtype))


def test_a_drawn_seed_is_reproducible_and_the_backward_passes_too(sum_of):
    def draws() -> list[torch.Tensor]:
        torch.manual_seed(3)
        input, residual = torch.ones(4, 256, device=DEVICE, requires_grad=True), torch.zeros(4, 256, device=DEVICE)
        sums = [sum_of(input, residual, dropout_p=0.5, training=True) for _ in range(3)]
        for s in sums:
            assert torch.equal(torch.autograd.grad(s, input, torch.ones_like(s))[0], s)
        return sums

    first, second = draws(), draws()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_statistics(sum_of, p):
    """Rate and expectation, and no correlation of neighbours or rows."""
    rows, cols = 4096, 512
    ones, zeros = torch.ones(rows, cols, device=DEVICE), torch.zeros(rows, cols, device=DEVICE)
    s = sum_of(ones, zeros, dropout_p=p, training=True, seed=torch.tensor(4, device=DEVICE)).double()
    deviation = (p / (1 - p)) ** 0.5
    limit = 5 / (rows * cols) ** 0.5
    assert abs(s.mean() - 1) < limit * deviation
    noise = (s - 1) / deviation
    assert (noise[:, :-1] * noise[:, 1:]).mean().abs() < limit
    assert (noise[:-1] * noise[1:]).mean().abs() < limit
