# SPDX-License-Identifier: BSD-3-Clause
"""The operators in torch's own operators, as they serve devices without kernels of ours: here on CPU tensors, by
calling what is registered for such a device."""

from __future__ import annotations

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet

from resnorm_ext import reference
from resnorm_ext.build.extension import ensure_loaded

from .cases import BIAS_ACTIVATION, CASES, DTYPES, SEED, Case, Inputs, eps_of

DEVICE_WITHOUT_KERNELS = DispatchKeySet(DispatchKey.PrivateUse1)


def composite(name: str, *args, **kwargs):
    ensure_loaded()
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.resnorm, name).default.redispatch(DEVICE_WITHOUT_KERNELS, *args, **kwargs)


def native(name: str, *args, **kwargs):
    return getattr(torch.ops.resnorm, name).default(*args, **kwargs)


def arguments(case: Case, inputs: Inputs, residual_dtype: torch.dtype | None = None) -> dict:
    """Of the public operator."""
    arguments = dict(inputs)
    if case.normalizes:
        arguments |= {"normalized_shape": inputs["input"].shape[-1:]}
    if case.adds:
        arguments |= {"dropout_p": case.dropout_p, "seed": SEED, "residual_dtype": residual_dtype}
    if case.operator == "add_layer_norm":
        arguments |= {"prenorm": case.prenorm}
    if case.activates:
        arguments |= {"activation": case.activation}
    return arguments


def as_tuple(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *taken_from: torch.dtype) -> None:
    """Within the rounding of the result's dtype and of those it was taken from."""
    assert actual.dtype == expected.dtype
    tolerance = 16 * max(eps_of(dtype) for dtype in (expected.dtype, *taken_from))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype):
    for residual_dtype in (None, torch.float32):
        call = arguments(case, case.make_inputs((3, 5, 40), dtype), residual_dtype)
        results = as_tuple(composite(case.operator, **call))
        for actual, expected in zip(results, as_tuple(native(case.operator, **call)), strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.adds or case.activates], ids=str)
def test_out(case):
    inputs = case.make_inputs((5, 40))
    call = arguments(case, inputs)
    results = as_tuple(composite(case.operator, **call))[: len(case.outputs)]
    outs = {name: inputs[target] for name, target in zip(("output", "sum"), ("input", "residual")[: len(results)])}
    optional = dict.fromkeys(["input_bias"] * case.adds + ["weight", "sum"] * case.normalizes)
    if not case.operator == "residual_add":
        optional |= {"bias": None}
    call = {"eps": 1e-5, **optional, **call, **outs}
    if not case.normalizes:
        call.pop("eps")
    call.pop("prenorm", None)
    assert composite(f"{case.operator}_out", **call) is None
    assert all(torch.equal(out, result) for out, result in zip(outs.values(), results, strict=True))


@pytest.mark.parametrize("p", [1e-5, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
def test_mask_is_the_kernels_bit_for_bit(p, seed):
    ones, zeros, seed = torch.ones(7, 33), torch.zeros(7, 33), torch.tensor(seed)
    keep = reference.dropout_keep_mask(seed, (7, 33), p)
    s = composite("residual_add", ones, zeros, None, p, seed, None)
    assert torch.equal(s, keep * torch.tensor(reference.dropout_scale(p)))
    (grad_input, _) = composite("_residual_add_backward", ones, None, p, seed, torch.float32, [True, False])
    assert torch.equal(grad_input, s)


def test_inf_in_dropped_places_contributes_nothing():
    infinite, zeros = torch.full((5, 40), torch.inf), torch.zeros(5, 40)
    s = composite("residual_add", infinite, zeros, None, 0.5, SEED, None)
    assert torch.equal(s.isinf(), reference.dropout_keep_mask(SEED, (5, 40), 0.5)) and not s.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_backward(dtype, affine):
    input, grad = torch.randn(2, 6, 40, dtype=torch.float64).to(dtype)
    weight, bias = torch.randn(2, 40).to(dtype) if affine else (None, None)
    _, mean, rstd = composite("_layer_norm_forward", input, [40], weight, bias, 1e-5)
    call = (grad, input, [40], weight, bias, mean, rstd, 1e-5, [True, affine, affine])
    for actual, expected in zip(composite("_layer_norm_backward", *call), native("_layer_norm_backward", *call)):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BIAS_ACTIVATION, ids=str)
def test_bias_activation_backward(case, dtype):
    input, grad = torch.randn(2, 6, 40, dtype=torch.float64).to(dtype)
    bias = torch.randn(40).to(dtype) if case.optional else None
    call = (grad, input, bias, case.activation, [True, bias is not None])
    results = composite("_bias_activation_backward", *call)
    for actual, expected in zip(results, native("_bias_activation_backward", *call), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=str)
def test_add_layer_norm_forward_and_backward(dtypes, residual_dtype):
    """Every result, the statistics among them, has the kernels' values, dtype and shape."""
    input, grad = torch.randn(2, 6, 40, dtype=torch.float64).to(dtypes[0])
    residual = torch.randn(6, 40, dtype=torch.float64).to(dtypes[1])
    weight, bias, input_bias = torch.randn(3, 40).to(dtypes[0])
    call = (input, residual, [40], weight, bias, 1e-5, input_bias, 0.3, SEED, residual_dtype)
    forward = composite("_add_layer_norm_forward", *call)
    for actual, expected in zip(forward, native("_add_layer_norm_forward", *call), strict=True):
        assert actual.shape == expected.shape
        assert_close(actual, expected)
    _, s, mean, rstd = forward
    grad_sum = torch.randn_like(s)
    call = (grad, grad_sum, s, [40], weight, bias, input_bias, mean, rstd, 1e-5, 0.3, SEED, dtypes[1], [True] * 5)
    backward = composite("_add_layer_norm_backward", *call)
    for actual, expected in zip(backward, native("_add_layer_norm_backward", *call), strict=True):
        assert_close(actual, expected, s.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_alias_nothing_and_have_the_strides_that_were_promised(dtype):
    """Else Inductor, which plans memory by the meta kernels, overwrites what it still needs."""
    x, r, grad = (torch.randn(8, 6, dtype=dtype).t() for _ in range(3))
    weight = bias = torch.ones(8, dtype=dtype)
    _, mean, rstd = native("_layer_norm_forward", x, [8], weight, bias, 1e-5)
    calls = {
        "layer_norm": (x, [8], None, None, 1e-5),
        "_layer_norm_backward": (grad[0], x[0], [8], weight, bias, mean[0], rstd[0], 1e-5, [True] * 3),
        "residual_add": (x, r, None, 0.0, None, None),
        "_residual_add_backward": (grad, None, 0.0, None, dtype, [True, False]),
        "bias_activation": (x, None, "relu"),
        "_bias_activation_backward": (grad, x, None, "relu", [True, False]),
        "add_layer_norm": (x, r, [8], None, None, 1e-5, None, 0.0, None, True, None),
        "_add_layer_norm_backward": (
            *(grad, None, x, [8], weight, bias, bias, mean, rstd, 1e-5, 0.0, None, dtype, [True] * 5),
        ),
    }
    for name, call in calls.items():
        meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in call]
        results = as_tuple(composite(name, *call))
        assert [r.stride() for r in results] == [r.stride() for r in as_tuple(native(name, *meta))], name
        storages = [
            r.untyped_storage().data_ptr() for r in (*results, *call) if isinstance(r, torch.Tensor) and r.numel()
        ]
        ours = storages[: sum(r.numel() > 0 for r in results)]
        assert len({*ours}) == len(ours) and not {*ours} & {*storages[len(ours) :]}, name
