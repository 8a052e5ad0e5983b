# SPDX-License-Identifier: BSD-3-Clause
"""How far results and gradients may be from the float64 formula's: what their dtypes round, and a little more."""

from __future__ import annotations

import torch
from torch import Tensor

from resnorm_ext import reference

from .cases import EPS, Case, Inputs, accumulation, eps_of, require_grad, to_double


class Roundings:
    """How many units in the last place a right result may be off, each with its reason."""

    ACTIVATED = 4  # a polynomial of float32 steps, bounded by its own test to 5.2e-7
    ADDED = 2  # three operands are added: two roundings
    NORMALIZED = 8  # mean, deviation, variance, rstd, their product and weight and bias, each rounded once
    GRADIENT = 8  # as NORMALIZED, of the largest gradient: a row's sums enter each of its elements
    OTHER_FORMULA = 16  # two right results, NORMALIZED each, of sums in another order
    OTHER_DEVICE = 32  # the same in float32, where CPU and GPU also differ in how they contract products
    OTHER_DEVICE_HALF = 4  # in a half type, whose own rounding hides that of float32


def check_results(
    case: Case,
    inputs: Inputs,
    results: tuple[Tensor, ...],
    *,
    normalized_dims: int = 1,
    residual_dtype: torch.dtype | None = None,
) -> None:
    """Each result is the formula's but for its dtype's rounding and a few roundings of the accumulation."""
    assert all(result.shape == inputs["input"].shape for result in results)
    exact = to_double(inputs)
    absent = torch.zeros((), dtype=torch.float64)
    if case.activates:
        (y,) = case.reference(exact)
        size = 1 + exact["input"].abs() + exact.get("bias", absent).abs()
        _check_each(
            case, results, {"y": y}, {"y": Roundings.ACTIVATED * eps_of(accumulation(inputs["input"].dtype)) * size}
        )
        return
    weight, bias = exact.pop("weight", absent + 1), exact.pop("bias", absent)
    dtypes = [inputs["input"].dtype]
    if case.adds:  # the sum's, stored or not; to sum up counts each operand's, to normalise the sum's alone
        dtypes.append(_sum_dtype(inputs, residual_dtype))
    if not case.normalizes:
        dtypes.append(inputs["residual"].dtype)
    eps = eps_of(accumulation(*dtypes))
    s, error_of_s = exact["input"], torch.zeros_like(exact["input"])
    if case.adds:
        (s,) = Case("residual_add", dropout_p=case.dropout_p).reference(exact)
        size = exact["residual"].abs() + exact["input"].abs() + exact.get("input_bias", absent).abs()
        error_of_s = Roundings.ADDED * eps * size
    expected, errors = {"s": s}, {"s": error_of_s}
    if case.normalizes and s.numel():
        dims = tuple(range(-normalized_dims, 0))
        shape = s.shape[-normalized_dims:]
        if case.centered:
            # Without what the row has in common, which float64 rounds too and a constant row shows multiplied.
            x = reference.layer_norm(s - s[(..., *[slice(1)] * normalized_dims)], shape)
            rstd = torch.rsqrt(s.var(dims, correction=0, keepdim=True) + EPS)
        else:
            x = reference.rms_norm(s, shape, eps=EPS)
            rstd = torch.rsqrt(s.square().mean(dims, keepdim=True) + EPS)
        # What the sum is off by moves the element and, through the row's statistics, once more its row.
        error_of_x = Roundings.NORMALIZED * eps * (1 + x.abs().amax(dims, keepdim=True))
        error_of_x = error_of_x + 2 * error_of_s.amax(dims, True) * rstd
        expected["y"] = x * weight + bias
        errors["y"] = error_of_x * weight.abs() + eps * bias.abs()
    _check_each(case, results, expected, errors)


def _check_each(case: Case, results: tuple[Tensor, ...], expected: Inputs, errors: Inputs) -> None:
    """Each result within its error and the rounding to its dtype."""
    for name, result in zip(case.outputs, results, strict=True):
        if result.numel():
            rounding = eps_of(result.dtype) / 2 * expected[name].abs() + torch.finfo(result.dtype).smallest_normal
            worst = ((result.double() - expected[name]).abs() / (errors[name] + rounding)).max()
            assert worst <= 1, f"{name} is off by {worst} tolerances"


def random_like(outputs: tuple[Tensor, ...], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def incoming_gradients(case: Case, inputs: Inputs, residual_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Random gradients of the results that ``inputs`` give, in the results' dtypes."""
    input = inputs["input"]
    dtypes = {"y": input.dtype, "s": _sum_dtype(inputs, residual_dtype)}
    return random_like(tuple(torch.empty_like(input, dtype=dtypes[name]) for name in case.outputs))


def reference_gradients(case: Case, inputs: Inputs, grads: list[Tensor], **options) -> dict[str, Tensor]:
    leaves = require_grad(to_double(inputs))
    outputs = case.reference(leaves, **options)
    return dict(zip(leaves, torch.autograd.grad(outputs, leaves.values(), [g.double() for g in grads]), strict=True))


def check_gradients(
    case: Case,
    inputs: Inputs,
    gradients: Inputs,
    grads: list[Tensor],
    *,
    residual_dtype: torch.dtype | None = None,
    **options,
) -> None:
    """Each of ``gradients`` has its tensor's dtype and shape and is the formula's for the incoming ``grads``."""
    expected = reference_gradients(case, inputs, grads, **options)
    for name, tensor in inputs.items():
        assert gradients[name].dtype == tensor.dtype and gradients[name].shape == tensor.shape
        # The sum is stored in the stream's dtype, and the gradients are taken from what is stored.
        stored = eps_of(_sum_dtype(inputs, residual_dtype)) if case.normalizes else 0.0
        resolution = max(eps_of(tensor.dtype), stored, eps_of(inputs["input"].dtype) if name == "input" else 0.0)
        largest = expected[name].abs().max() if tensor.numel() else 0.0
        bound = float(Roundings.GRADIENT * resolution * largest)
        torch.testing.assert_close(gradients[name].double(), expected[name], rtol=0, atol=bound)


def _sum_dtype(inputs: Inputs, residual_dtype: torch.dtype | None) -> torch.dtype:
    input = inputs["input"]
    return residual_dtype or torch.promote_types(input.dtype, inputs.get("residual", input).dtype)
