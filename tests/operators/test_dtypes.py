# SPDX-License-Identifier: BSD-3-Clause
"""The table of dtypes: (input, residual, residual_dtype) -> (y, s), and which parameters go with which input."""

from __future__ import annotations

import itertools

import pytest
import torch

from resnorm_ext.functional import add_layer_norm, add_rms_norm, bias_activation, layer_norm, residual_add

from .cases import DTYPES, HALVES, SEED

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# The sum's dtype where residual_dtype is None: torch's type promotion, written out.
PROMOTED = {
    (F32, F32): F32,
    (F32, F64): F64,
    (F32, BF16): F32,
    (F32, F16): F32,
    (F64, F64): F64,
    (F64, BF16): F64,
    (F64, F16): F64,
    (BF16, BF16): BF16,
    (BF16, F16): F32,
    (F16, F16): F16,
}
PROMOTED |= {(b, a): dtype for (a, b), dtype in PROMOTED.items()}


@pytest.mark.parametrize("residual_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize(("dtype", "residual"), PROMOTED, ids=str)
def test_sum_and_output(dtype, residual, residual_dtype):
    expected = residual_dtype or PROMOTED[dtype, residual]
    for requires_grad in (False, True):
        x = torch.randn(3, 8).to(dtype).requires_grad_(requires_grad)
        r = torch.randn(3, 8).to(residual).requires_grad_(requires_grad)
        for dropout in ({}, {"dropout_p": 0.5, "training": True, "seed": SEED}):
            options = {"residual_dtype": residual_dtype, **dropout}
            assert residual_add(x, r, **options).dtype == expected
            y, s = add_layer_norm(x, r, (8,), prenorm=True, **options)
            assert (y.dtype, s.dtype) == (dtype, expected)
            assert add_layer_norm(x, r, (8,), **options).dtype == dtype


def test_a_scalar_residual_does_not_give_way():
    """Unlike a Python number's, a zero-dimensional tensor's dtype counts: the sum's is a matter of dtypes alone."""
    assert residual_add(torch.tensor(1.0, dtype=F32), torch.tensor(1.0, dtype=F64)).dtype == F64
    assert residual_add(torch.tensor(1.0, dtype=BF16), torch.tensor(1.0, dtype=F32)).dtype == F32


@pytest.mark.parametrize(("dtype", "parameter"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_parameters_are_of_the_inputs_dtype_or_float32_beside_a_half_precision_input(dtype, parameter):
    """Which is what torch's layer_norm takes on a CPU."""
    x, vector = torch.randn(3, 8).to(dtype), torch.randn(8).to(parameter)
    calls = [
        lambda: layer_norm(x, (8,), vector),
        lambda: layer_norm(x, (8,), None, vector),
        lambda: add_layer_norm(x, x, (8,), vector),
        lambda: add_layer_norm(x, x, (8,), None, vector),
        lambda: add_layer_norm(x, x, (8,), input_bias=vector),
        lambda: residual_add(x, x, vector),
        lambda: bias_activation(x, vector),
    ]
    fits = parameter == dtype or (dtype in HALVES and parameter == F32)
    if fits:
        assert torch.nn.functional.layer_norm(x, (8,), vector, vector).dtype == dtype
        assert all(call().dtype == dtype for call in calls)
        return
    with pytest.raises(RuntimeError) as torchs:
        torch.nn.functional.layer_norm(x, (8,), vector, vector)
    for call in calls:
        with pytest.raises(type(torchs.value), match=r"Expected .* of dtype .* but got") as ours:
            call()
        assert len({str(dtype), str(parameter)}) == 2 and "input" in str(ours.value)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weight_and_bias_of_different_dtypes(dtype):
    x, weight, bias = torch.randn(3, 8).to(dtype), torch.randn(8), torch.randn(8).to(dtype)
    expected = torch.nn.functional.layer_norm(x.double(), (8,), weight.double(), bias.double())
    output = layer_norm(x, (8,), weight, bias)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_float32_stream_keeps_what_half_precision_would_lose(dtype):
    """A thousand small steps onto a large value."""
    stream, step = torch.full((1, 8), 256.0), torch.full((1, 8), 2**-7).to(dtype)
    for _ in range(1000):
        stream = residual_add(step, stream)
    assert stream.dtype == torch.promote_types(F32, dtype)
    assert torch.equal(stream, torch.full_like(stream, 256 + 1000 * 2**-7))


def test_float64_is_accumulated_in_float64_wherever_it_comes_in():
    """Also where y is float32 and no sum is asked for."""
    x, residual = torch.randn(4, 64), torch.randn(4, 64, dtype=F64) + 1e6
    expected = torch.nn.functional.layer_norm(x.double() + residual, (64,))
    for prenorm in (False, True):
        result = add_layer_norm(x, residual, (64,), prenorm=prenorm)
        y = result[0] if prenorm else result
        assert (y.double() - expected).abs().max() < 2e-7


@pytest.mark.parametrize("residual", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [add_layer_norm, add_rms_norm])
def test_a_sum_that_is_not_stored_has_its_dtype_all_the_same(norm, dtype, residual):
    x, r = torch.randn(5, 64).to(dtype), (torch.randn(5, 64, dtype=torch.float64) + 1e4).to(residual)
    expected, sums = norm(x, r, (64,), prenorm=True, residual_dtype=torch.float64)
    assert sums.dtype == torch.float64
    assert torch.equal(norm(x, r, (64,), residual_dtype=torch.float64), expected)
    assert torch.equal(norm(x, r, (64,), residual_dtype=torch.float64, out=torch.empty_like(x)), expected)
