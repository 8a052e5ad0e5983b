# SPDX-License-Identifier: BSD-3-Clause
"""The operators in torch's own operators, as they serve devices without kernels of ours: here on CPU tensors, by
calling what is registered for such a device."""

from __future__ import annotations

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet

from resnorm_ext import reference
from resnorm_ext.build.extension import ensure_loaded

from .cases import BIAS_ACTIVATION, CASES, DTYPES, EPS, SEED, Case, Inputs, eps_of
from .exactness import Roundings

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
    if case.drops:
        arguments |= {"dropout_p": case.dropout_p, "seed": SEED}
    if case.adds:
        arguments |= {"residual_dtype": residual_dtype}
    if case.adds and case.normalizes:
        arguments |= {"prenorm": case.prenorm}
    if case.normalizes and not case.centered:
        arguments |= {"eps": EPS}
    if case.activates:
        arguments |= {"activation": case.activation}
    return arguments


def as_tuple(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *taken_from: torch.dtype) -> None:
    """Within the rounding of the result's dtype and of those it was taken from."""
    assert actual.dtype == expected.dtype
    tolerance = Roundings.OTHER_FORMULA * max(eps_of(dtype) for dtype in (expected.dtype, *taken_from))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_alike(results: tuple, expected: tuple, *taken_from: torch.dtype) -> None:
    """Each result as expected, or none where none is expected."""
    for actual, other in zip(results, expected, strict=True):
        assert (actual is None) == (other is None)
        if actual is not None:
            assert actual.shape == other.shape
            assert_close(actual, other, *taken_from)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype):
    for residual_dtype in (None, torch.float32):
        call = arguments(case, case.make_inputs((3, 5, 40), dtype), residual_dtype)
        results = as_tuple(composite(case.operator, **call))
        for actual, expected in zip(results, as_tuple(native(case.operator, **call)), strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.drops], ids=str)
def test_out(case):
    inputs = case.make_inputs((5, 40))
    call = arguments(case, inputs)
    results = as_tuple(composite(case.operator, **call))[: len(case.outputs)]
    outs = {name: inputs[target] for name, target in zip(("output", "sum"), ("input", "residual")[: len(results)])}
    if case.normalizes:
        absent = dict.fromkeys(["input_bias", "weight", "bias", "sum"])
        operator, call = "_norm_out", {"centered": case.centered, "eps": EPS, **absent, **call}
        call.pop("prenorm")
    else:
        operator, call = f"{case.operator}_out", dict.fromkeys(["input_bias"] if case.adds else ["bias"]) | call
    assert composite(operator, **(call | outs)) is None
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
@pytest.mark.parametrize("centered", [True, False])
def test_norm_backward(dtype, affine, centered):
    input, grad = torch.randn(2, 6, 40, dtype=torch.float64).to(dtype)
    weight, bias = torch.randn(2, 40).to(dtype) if affine else (None, None)
    bias = bias if centered else None
    norm = ([40], weight, bias, 1e-5, centered)
    _, _, mean, rstd = composite("_norm_forward", input, None, None, 0.0, None, None, *norm, False, True)
    wanted = [True, False, False, weight is not None, bias is not None]
    call = (grad, None, input, mean, rstd, None, 0.0, None, dtype, *norm, wanted)
    assert_alike(composite("_norm_backward", *call), native("_norm_backward", *call))
    assert [result is not None for result in native("_norm_backward", *call)] == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BIAS_ACTIVATION, ids=str)
def test_bias_activation_backward(case, dtype):
    input, grad = torch.randn(2, 6, 40, dtype=torch.float64).to(dtype)
    bias = torch.randn(40).to(dtype) if case.optional else None
    call = (grad, input, bias, case.activation, case.dropout_p, SEED, [True, bias is not None, True])
    assert_alike(composite("_bias_activation_backward", *call), native("_bias_activation_backward", *call))


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("centered", [True, False])
def test_norm_of_a_sum_forward_and_backward(dtypes, residual_dtype, centered):
    """Every result, the statistics among them, has the kernels' values, dtype and shape."""
    input, grad = torch.randn(2, 6, 40, dtype=torch.float64).to(dtypes[0])
    residual = torch.randn(6, 40, dtype=torch.float64).to(dtypes[1])
    weight, bias, input_bias = torch.randn(3, 40).to(dtypes[0])
    norm = ([40], weight, bias if centered else None, 1e-5, centered)
    call = (input, residual, input_bias, 0.3, SEED, residual_dtype, *norm, True, True)
    forward = composite("_norm_forward", *call)
    assert_alike(forward, native("_norm_forward", *call))
    _, s, mean, rstd = forward
    wanted = [True, True, True, True, centered]
    call = (grad, torch.randn_like(s), s, mean, rstd, input_bias, 0.3, SEED, dtypes[1], *norm, wanted)
    assert_alike(composite("_norm_backward", *call), native("_norm_backward", *call), s.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_alias_nothing_and_have_the_strides_that_were_promised(dtype):
    """Else Inductor, which plans memory by the meta kernels, overwrites what it still needs."""
    x, r, grad = (torch.randn(8, 6, dtype=dtype).t() for _ in range(3))
    weight = bias = torch.ones(8, dtype=dtype)
    norm = ([8], weight, bias, 1e-5, True)
    _, _, mean, rstd = native("_norm_forward", x, None, None, 0.0, None, None, *norm, False, True)
    calls = {
        "layer_norm": (x, [8], None, None, 1e-5),
        "rms_norm": (x, [8], None, 1e-5),
        "residual_add": (x, r, None, 0.0, None, None),
        "_residual_add_backward": (grad, None, 0.0, None, dtype, [True, False]),
        "bias_activation": (x, None, "relu", 0.0, None),
        "_bias_activation_backward": (grad, x, None, "relu", 0.0, None, [True, False, True]),
        "add_layer_norm": (x, r, [8], None, None, 1e-5, None, 0.0, None, True, None),
        "add_rms_norm": (x, r, [8], None, 1e-5, None, 0.0, None, True, None),
        "_norm_backward": (grad, None, x, mean, rstd, bias, 0.0, None, dtype, *norm, [True] * 5),
    }
    for name, call in calls.items():
        meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in call]
        results, promised = (
            [result for result in as_tuple(each) if result is not None]
            for each in (composite(name, *call), native(name, *meta))
        )
        assert [r.stride() for r in results] == [r.stride() for r in promised], name
        storages = [
            r.untyped_storage().data_ptr() for r in (*results, *call) if isinstance(r, torch.Tensor) and r.numel()
        ]
        ours = storages[: sum(r.numel() > 0 for r in results)]
        assert len({*ours}) == len(ours) and not {*ours} & {*storages[len(ours) :]}, name
