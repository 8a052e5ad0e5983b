# SPDX-License-Identifier: BSD-3-Clause
"""Errors beside those of PyTorch's own kernels in the same dtype, both against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import layer_norm as torch_layer_norm
from torch.nn.functional import rms_norm as torch_rms_norm

from resnorm_ext.functional import add_layer_norm, layer_norm

from .cases import (
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    BIAS_ACTIVATION,
    EPS,
    FULL_CASES,
    HALVES,
    LAYER_NORM,
    RESIDUAL_ADD,
    RMS_NORM,
    TORCH_ACTIVATIONS,
    Case,
    eps_of,
    require_grad,
    to_double,
)

SEEDS = 100
SHAPES = [(4, 768), (16, 37), (2, 3001), (257, 64)]
TYPES = [torch.float32, *HALVES]
WITHOUT_DROPOUT = [
    *(LAYER_NORM[-1], RESIDUAL_ADD[2], ADD_LAYER_NORM[4], RMS_NORM[-1], ADD_RMS_NORM[3], BIAS_ACTIVATION[-4])
]
assert not any(case.dropout_p for case in WITHOUT_DROPOUT)

Results = dict[str, Tensor]


@pytest.fixture
def one_thread():
    """torch sums weight gradients thread by thread, and so its error would depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchs(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What people write with PyTorch's operators; in float64, the truth."""
    s = inputs["input"]
    if case.activates:
        return (TORCH_ACTIVATIONS[case.activation](s + inputs["bias"]),)
    if case.adds:
        s = inputs["residual"] + (s + inputs["input_bias"] if "input_bias" in inputs else s)
    if not case.normalizes:
        return (s,)
    if case.centered:
        y = torch_layer_norm(s, s.shape[-1:], inputs.get("weight"), inputs.get("bias"))
    else:
        y = torch_rms_norm(s, s.shape[-1:], inputs.get("weight"), EPS)
    return (y, s)[: len(case.outputs)]


def outputs_and_gradients(case: Case, run: Callable, inputs: dict[str, Tensor], grads: list[Tensor]) -> Results:
    leaves = require_grad(inputs)
    outputs = run(case, leaves)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [g.to(o) for g, o in zip(grads, outputs)])
    return dict(zip(case.outputs, outputs)) | {f"grad_{name}": grad for name, grad in zip(leaves, gradients)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", WITHOUT_DROPOUT, ids=str)
@pytest.mark.usefixtures("one_thread")
def test_no_less_accurate_than_torch(case, dtype, shape):
    """Mean of the RMS error over seeds at most 1.05 times torch's; on no seed worse than 3 times or 2 ulp."""
    mean_errors: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        inputs = case.make_inputs(shape, dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in case.outputs]
        exact = outputs_and_gradients(case, torchs, to_double(inputs), grads)
        ours = outputs_and_gradients(case, Case.ours, inputs, grads)
        theirs = outputs_and_gradients(case, torchs, inputs, grads)
        for name, expected in exact.items():
            errors = [(actual[name].double() - expected).square().mean().sqrt().item() for actual in (ours, theirs)]
            worst = [(actual[name].double() - expected).abs().max().item() for actual in (ours, theirs)]
            ulp = eps_of(dtype) * expected.abs().max().item()
            assert worst[0] <= max(3 * worst[1], 2 * ulp), f"{name}, seed {seed}"
            totals = mean_errors.setdefault(name, [0.0, 0.0])
            totals[0] += errors[0] / SEEDS
            totals[1] += errors[1] / SEEDS
    for name, (ours_mean, theirs_mean) in mean_errors.items():
        assert ours_mean <= 1.05 * theirs_mean, f"{name}: {ours_mean:.4g} against torch's {theirs_mean:.4g}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_weight_gradients_are_summed_in_float32(dtype):
    """4096 rows: sums kept in half precision would lose half of the digits."""
    case = FULL_CASES[0]
    inputs = case.make_inputs((4096, 24), dtype)
    grads = [torch.randn(4096, 24).to(dtype)]
    exact = outputs_and_gradients(case, torchs, to_double(inputs), grads)
    ours = outputs_and_gradients(case, Case.ours, inputs, grads)
    for name in ("grad_weight", "grad_bias"):
        rounding = eps_of(dtype) / 2 * exact[name].abs()
        assert ((ours[name].double() - exact[name]).abs() <= 1.01 * rounding + 2e-4).all()


@pytest.mark.parametrize("base", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("cols", [7, 768, 4099])
def test_rows_far_from_zero(base, cols):
    input = torch.randn(16, cols) + base
    for row in (input, -input):
        expected = torch_layer_norm(row.double(), (cols,))
        assert (layer_norm(row, (cols,)).double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("start", [10.0, 1e3, -1e6])
@pytest.mark.parametrize("cols", [20, 768, 4099, 20000])
def test_rows_that_begin_unlike_the_rest(start, cols):
    """Where a first guess of the mean is a bad one."""
    input = torch.randn(7, cols)
    input[:, :16] += start
    expected = torch_layer_norm(input.double(), (cols,))
    error = layer_norm(input, (cols,)).double() - expected
    assert (error / expected.abs().clamp(min=1)).abs().max() < 1e-6


@pytest.mark.parametrize("base", [1e2, 1e4, 1e6])
def test_gradients_of_rows_far_from_zero(base):
    cols, grad = 768, torch.randn(16, 768)
    input = torch.randn(16, cols) + base
    exact = input.double().requires_grad_()
    torch_layer_norm(exact, (cols,)).backward(grad.double())
    leaf = input.requires_grad_()
    layer_norm(leaf, (cols,)).backward(grad)
    assert (leaf.grad - exact.grad).abs().max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("cols", [1, 3, 64, 1000])
def test_constant_rows_give_exactly_the_bias(dtype, cols):
    values = torch.tensor([0.0, 1.0, -0.1, 1e4 / 3, 3e4, 1e-30]).to(dtype)
    weight, bias = torch.randn(cols).to(dtype), torch.randn(cols).to(dtype)
    output = layer_norm(values[:, None].expand(-1, cols).contiguous(), (cols,), weight, bias)
    assert torch.equal(output, bias.expand_as(output))


def test_float64_keeps_its_digits():
    """Against extended precision, as another float64 formula would be no better."""
    import numpy as np

    input = torch.randn(8, 501, dtype=torch.float64) + 1e6
    x = input.numpy().astype(np.longdouble)
    x = x - x[:, :1]
    centered = x - x.mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    assert np.abs(layer_norm(input, (501,)).numpy() - expected).max() < 1e-14


@pytest.mark.parametrize("adds", [False, True])
def test_what_is_differentiated_again_and_transformed_is_as_accurate_far_from_zero(adds):
    """These take the formula in torch's operators, which corrects the mean as the kernels do."""
    x = torch.randn(8, 768) + 1e6
    weight = torch.randn(768)

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if adds:
            return add_layer_norm(x, torch.zeros_like(x), (768,), weight)
        return layer_norm(x, (768,), weight)

    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = torch.nn.functional.layer_norm(exact_x, (768,), exact_weight)
    torch.testing.assert_close(vmap(function, (0, None))(x, weight).double(), exact, rtol=0, atol=1e-5)
    grad = torch.randn(8, 768)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    gradients = torch.autograd.grad(function(*leaves), leaves, grad, create_graph=True)
    exact_gradients = torch.autograd.grad(exact, (exact_x, exact_weight), grad.double())
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64, None), (torch.float32, torch.float64, torch.float32)]
)
def test_the_norm_does_not_depend_on_whether_the_sum_is_stored(dtypes):
    dtype, residual, residual_dtype = dtypes
    x, r = torch.randn(4, 768, dtype=dtype), torch.randn(4, 768, dtype=residual) + 1e6
    y, _ = add_layer_norm(x, r, (768,), prenorm=True, residual_dtype=residual_dtype)
    assert torch.equal(add_layer_norm(x, r, (768,), residual_dtype=residual_dtype), y)
