# SPDX-License-Identifier: BSD-3-Clause
"""The norms and add norms: the modules around the functionals, which have tests of their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import resnorm_ext
import resnorm_ext.modules as rn

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}  # float64
OPTIONS = [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.5}]


def randomize(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


RMS_OPTIONS = [{}, {"elementwise_affine": False}, {"eps": 0.5}]


@pytest.mark.parametrize(
    ("stock", "module", "options"),
    [(nn.LayerNorm, rn.LayerNorm, options) for options in OPTIONS]
    + [(nn.RMSNorm, rn.RMSNorm, options) for options in RMS_OPTIONS],
    ids=str,
)
@pytest.mark.parametrize("shape", [7, (3, 7)], ids=str)
def test_as_torchs(stock, module, shape, options):
    reference = randomize(stock(shape, dtype=torch.float64, **options))
    ours = module(shape, dtype=torch.float64, **options)
    assert repr(ours) == repr(reference)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    grad_output = torch.randn_like(x)
    results = [
        (output, *torch.autograd.grad(output, [x, *module.parameters()], grad_output))
        for module in (reference, ours)
        for output in [module(x)]
    ]
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)


@pytest.mark.parametrize("weight", [torch.float32, torch.float64, torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_rms_norm_takes_all_dtypes_that_torchs_takes(dtype, weight):
    stock = nn.RMSNorm(8, elementwise_affine=weight is not None, dtype=weight)
    ours, x = resnorm_ext.accelerate(copy.deepcopy(stock)), torch.randn(3, 8).to(dtype)
    try:
        expected = stock(x)
    except Exception as error:
        with pytest.raises(type(error)):
            ours(x)
        return
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize("prenorm", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("options", RMS_OPTIONS, ids=str)
def test_add_rms_norm(options, prenorm):
    reference = randomize(nn.RMSNorm(7, dtype=torch.float64, **options))
    ours = rn.AddRMSNorm(7, dtype=torch.float64, prenorm=prenorm, dropout_p=0.5, **options).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert "dropout_p=0.5" in repr(ours)
    x, residual = torch.randn(2, 2, 3, 7, dtype=torch.float64, requires_grad=True).unbind(0)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    total = residual + x + bias
    expected = (reference(total), total) if prenorm else reference(total)
    torch.testing.assert_close(ours(x, residual, bias), expected, **TOLERANCE)
    assert torch.autograd.gradcheck(ours, (x, residual, bias))


@pytest.mark.parametrize("prenorm", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("input_bias", [False, True], ids=["no input bias", "input bias"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_add_layer_norm(options, input_bias, prenorm):
    reference = randomize(nn.LayerNorm(7, dtype=torch.float64, **options))
    ours = rn.AddLayerNorm(7, dtype=torch.float64, prenorm=prenorm, dropout_p=0.5, **options).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    x, residual = torch.randn(2, 2, 3, 7, dtype=torch.float64, requires_grad=True).unbind(0)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True) if input_bias else None
    total = residual + x if bias is None else residual + x + bias
    expected = (reference(total), total) if prenorm else reference(total)
    torch.testing.assert_close(ours(x, residual, bias), expected, **TOLERANCE)
    assert torch.autograd.gradcheck(ours, (x, residual, bias))


def test_add_layer_norm_drops_in_train_mode():
    norm = rn.AddLayerNorm(1000, elementwise_affine=False, prenorm=True, dropout_p=0.25)
    x, residual = torch.ones(20, 1000), torch.zeros(20, 1000)
    _, total = norm(x, residual)
    dropped = total == 0
    torch.testing.assert_close(total[~dropped], torch.full_like(total[~dropped], 4 / 3))
    assert abs(dropped.float().mean() - 0.25) < 5 * (0.25 * 0.75 / dropped.numel()) ** 0.5  # five deviations
    assert torch.equal(norm.eval()(x, residual)[1], x)


def test_add_layer_norm_keeps_a_wider_residual_stream():
    norm = rn.AddLayerNorm(8, prenorm=True, residual_dtype=torch.float32).bfloat16()
    y, total = norm(torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16))
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(copy_of):
    norm = randomize(rn.AddLayerNorm(8, 1e-3, dropout_p=0.5, prenorm=True, residual_dtype=torch.float64))
    duplicate = copy_of(norm)
    assert repr(duplicate) == repr(norm)
    assert "dropout_p=0.5, prenorm=True, residual_dtype=torch.float64" in repr(norm)
    x, residual = torch.randn(2, 3, 8).unbind(0)
    torch.testing.assert_close(duplicate.eval()(x, residual), norm.eval()(x, residual), rtol=0, atol=0)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, float("nan")])
def test_dropout_outside_the_unit_interval_raises(dropout_p):
    for norm in (rn.AddLayerNorm, rn.AddRMSNorm):
        with pytest.raises(ValueError, match="between 0 and 1, but got"):
            norm(8, dropout_p=dropout_p)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_patched_functions_run(norm, monkeypatch):
    """Each norm asks for its own of torch's functions."""
    ours, x = resnorm_ext.accelerate(norm(8)), torch.randn(2, 8)
    assert type(ours) is not norm
    expected = ours(x) + 1
    name = "layer_norm" if norm is nn.LayerNorm else "rms_norm"
    original = getattr(torch.nn.functional, name)
    monkeypatch.setattr(torch.nn.functional, name, lambda *args: original(*args) + 1)
    torch.testing.assert_close(ours(x), expected)
    monkeypatch.undo()
    monkeypatch.setattr(norm, "forward", lambda self, x: x)
    assert ours(x) is x
