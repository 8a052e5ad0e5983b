# SPDX-License-Identifier: BSD-3-Clause
"""NaN, Inf, subnormal numbers, overflow: as torch; and what dropout does with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import layer_norm as torch_layer_norm

from resnorm_ext import reference
from resnorm_ext.functional import add_layer_norm, add_rms_norm, bias_activation, layer_norm, residual_add

from .cases import DTYPES, HALVES, SEED, TORCH_ACTIVATIONS

pytestmark = pytest.mark.every_isa

INF, NAN = math.inf, math.nan
RATES = [0.0, 1e-6, 7.7e-6, 0.1, 0.99999, 0.999995, 1.0]


def rows_with(*special: float, dtype: torch.dtype, cols: int = 37) -> torch.Tensor:
    """One row for each special value and place (first, in a vector, in the tail), and ordinary rows between them."""
    rows = torch.randn(6 * len(special), cols).to(dtype)
    for i, value in enumerate(special):
        for j, place in enumerate((0, 11, cols - 1)):
            rows[6 * i + 2 * j, place] = value
    return rows


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within rounding, NaN where NaN, Inf where Inf."""
    tolerance = 2 * torch.finfo(actual.dtype).eps if actual.dtype in HALVES else 1e-5
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=tolerance, atol=tolerance)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """But for NaN's."""
    same = actual.view(torch.int16) == expected.view(torch.int16)
    assert (same | (actual.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_forward_and_backward(dtype):
    input = rows_with(INF, -INF, NAN, 0.0, dtype=dtype)
    input[1, 3], input[1, 30] = INF, -INF
    weight, bias = torch.randn(2, 37).to(dtype)
    grad = rows_with(0.0, 0.0, INF, NAN, dtype=dtype)
    results = []
    for function in (layer_norm, torch_layer_norm):
        leaves = [tensor.clone().requires_grad_() for tensor in (input, weight, bias)]
        output = function(leaves[0], (37,), *leaves[1:])
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_add_and_add_layer_norm(dtype):
    input, residual = rows_with(INF, -INF, NAN, dtype=dtype), rows_with(INF, INF, 0.0, dtype=dtype)
    expected = input + residual
    assert expected.isnan().any() and expected.isinf().any()
    assert_same(residual_add(input, residual), expected)
    y, s = add_layer_norm(input, residual, (37,), prenorm=True)
    assert_same(s, expected)
    assert torch.equal(y.isnan(), torch_layer_norm(expected.double(), (37,)).isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", RATES)
def test_dropped_values_contribute_nothing_whatever_they_are(dtype, p):
    """Also Inf and NaN, forward and backward; at a rate that rounds to 1 the sum is the residual, bit for bit."""
    shape = (24, 37)
    input = rows_with(INF, -INF, NAN, 1.0, dtype=dtype)
    residual = torch.randn(shape).to(dtype)
    keep = torch.ones(shape, dtype=torch.bool)
    if reference.dropout_threshold(p):
        keep = reference.dropout_keep_mask(SEED, shape, p)
    exact = reference.residual_add(input.double(), residual.double(), dropout_p=p, seed=SEED)
    input.requires_grad_()
    s = residual_add(input, residual, dropout_p=p, training=True, seed=SEED)
    assert torch.equal(s.isfinite(), keep.logical_not() | input.isfinite())
    assert torch.equal(s[~keep], residual[~keep])
    assert_same(s, exact.to(dtype))
    (grad_input,) = torch.autograd.grad(s, input, rows_with(INF, -INF, NAN, 1.0, dtype=dtype))
    assert torch.equal(grad_input.isfinite(), keep.logical_not() | input.isfinite())
    assert (grad_input[~keep] == 0).all()
    y, s_of_norm = add_layer_norm(input.detach(), residual, (37,), dropout_p=p, training=True, seed=SEED, prenorm=True)
    assert_same(s_of_norm, s.detach())
    assert torch.equal(y.isnan().any(1), s.detach().isfinite().all(1).logical_not())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_bias_activation_forward_and_backward(activation, dtype):
    """As torch's float64 operators; its vectorized float32 ones have NaN for gelu(Inf), and tanh's far derivatives."""
    input = rows_with(INF, -INF, NAN, 0.0, 3e4, -3e4, dtype=dtype)
    exact = input.double().requires_grad_()
    expected = TORCH_ACTIVATIONS[activation](exact)
    leaf = input.clone().requires_grad_()
    output = bias_activation(leaf, activation=activation)
    assert_same(output, expected.to(dtype))
    grads = torch.autograd.grad(output, leaf, torch.ones_like(output)), torch.autograd.grad(expected.sum(), exact)
    assert_same(grads[0][0], grads[1][0].to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_number_passes_through_unchanged(dtype):
    numbers = torch.arange(65536).to(torch.int16).view(dtype)
    zero = torch.full_like(numbers, -0.0)
    for s in (residual_add(zero, numbers), residual_add(numbers, zero)):
        assert_same_bits(s, numbers)
    widened = residual_add(numbers, zero.float())
    assert torch.equal(widened.nan_to_num(7), numbers.float().nan_to_num(7))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_rounding_to_half_precision_is_torchs(dtype, wide):
    """Random numbers over all exponents, subnormal results, overflow and ties."""
    bits = torch.randint(-(2**31), 2**31, (100_003,)).to(torch.int32)
    halves = torch.arange(65535).to(torch.int16).view(dtype)
    ties = (halves[:-1].double() + halves[1:].double()) / 2
    numbers = torch.cat([bits.view(torch.float32).double(), ties]).to(wide)
    numbers = numbers[~numbers.isnan()]
    zero = torch.full_like(numbers, -0.0)
    s = residual_add(zero, numbers, residual_dtype=dtype)
    assert_same_bits(s, numbers.to(dtype))


def test_a_finite_row_of_large_numbers():
    for scale in (1e10, 1e15, 1e18):
        row = torch.randn(3, 129) * scale
        assert_same(layer_norm(row, (129,)), torch_layer_norm(row.double(), (129,)).float())


def test_a_row_of_subnormal_and_tiny_numbers():
    for scale in (1e-20, 1e-36, 1e-38, 1e-42):
        row = torch.randn(3, 129) * scale
        expected = torch_layer_norm(row.double(), (129,))
        assert (layer_norm(row, (129,)).double() - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-42


def test_a_float16_sum_that_overflows_is_normalised_all_the_same():
    """y takes the exact sum; s rounds to Inf, as the addition in that dtype."""
    largest = torch.full((1, 64), torch.finfo(torch.float16).max, dtype=torch.float16)
    input = (torch.randn(1, 64) * 8000).half()
    y, s = add_layer_norm(input, largest, (64,), prenorm=True)
    assert torch.equal(s, input + largest) and s.isinf().any()
    torch.testing.assert_close(y, torch_layer_norm(input.double() + largest.double(), (64,)).half())


@pytest.mark.parametrize("norm", [add_layer_norm, add_rms_norm])
@pytest.mark.parametrize("prenorm", [False, True])
def test_a_float16_sum_that_overflows_has_no_finite_gradient(norm, prenorm):
    """The exact sum is lost by then, and what takes its place must not pass for a gradient; other rows keep theirs."""
    input, residual = (torch.randn(3, 64).half().requires_grad_() for _ in range(2))
    with torch.no_grad():
        input[1, 5], residual[1, 5] = 60000, 50000
    y = norm(input, residual, (64,), prenorm=prenorm)
    y = y[0] if prenorm else y
    assert y.isfinite().all()
    for gradient in torch.autograd.grad(y.float().square().sum() + y.float().sum(), (input, residual)):
        assert gradient.isfinite().all(-1).tolist() == [True, False, True] and not gradient[1].isfinite().any()
