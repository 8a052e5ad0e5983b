# SPDX-License-Identifier: BSD-3-Clause
"""Everyday modes in which inference is still inference: grad mode with nothing that requires grad, autocast, and
half-precision checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnorm_ext.engine import linear
from resnorm_ext.engine.linear import LinearShape
from resnorm_ext.integrations import accelerate

from .families import FAMILIES, MASK, assert_same, output_of, taken
from .test_originals import FAST


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(autouse=True)
def torch_nn_without_its_fast_path():
    """It does not look whether autocast is on for the CPU, and gives bfloat16 there."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def pair(family) -> tuple[nn.Module, nn.Module]:
    model = family.build()
    return model, accelerate(copy.deepcopy(model), padding="skip")


class TestGradModeOn:
    def test_nothing_requires_grad(self, family, pair):
        for each in pair:
            each.requires_grad_(False)
        batch = family.batch(pair[0])
        expected, actual = (output_of(each, batch) for each in pair)
        assert_same(actual, expected)
        assert taken(pair[1]) <= FAST and not actual.requires_grad

    @pytest.mark.parametrize("which", [0, -1])
    def test_one_parameter_requires_grad(self, family, pair, which):
        """Whichever it is, its gradient is the original's."""
        batch, grads = family.batch(pair[0]), []
        for each in pair:
            each.requires_grad_(False)
            layer = family.layer(each, -1)
            parameter = list(layer.parameters())[which].requires_grad_()
            output = output_of(each, batch)
            output[0].square().sum().backward()
            grads.append(parameter.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=2e-4, atol=2e-4)
        reasons = {reason for _, reason in taken(pair[1]) if reason is not None}
        assert any("requires grad: use torch.no_grad()" in reason for reason in reasons)

    def test_it_may_change_from_call_to_call(self, family, pair):
        _, accelerated = pair
        accelerated.requires_grad_(False)
        batch = family.batch(accelerated)
        output_of(accelerated, batch)
        parameter = list(family.layer(accelerated, -1).parameters())[-1].requires_grad_()
        output_of(accelerated, batch)[0].sum().backward()
        assert parameter.grad is not None
        parameter.requires_grad_(False)
        assert not output_of(accelerated, batch).requires_grad

    def test_the_input_requires_grad(self, family, pair):
        """Of a layer alone."""
        grads = []
        x = torch.randn(3, 9, 32)
        for each in pair:
            layer = family.layer(each.requires_grad_(False))
            y = x.clone().requires_grad_()
            output = layer(y, *family.layer_arguments)
            (output if isinstance(output, torch.Tensor) else output[0]).square().sum().backward()
            grads.append(y.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad mode"])
@pytest.mark.parametrize("multiplied", [torch.bfloat16, torch.float32])
def test_autocast(family, pair, grad, multiplied, monkeypatch):
    """Errors are those of autocast, also where the CPU multiplies float32 faster."""
    model, accelerated = pair
    seconds = linear._seconds.copy()
    for dtype in (torch.bfloat16, torch.float32):
        for sizes in ((32, 96), (32, 32), (32, 64), (64, 32)):
            seconds[LinearShape(dtype, *sizes)] = 1.0 + (dtype != multiplied)
    monkeypatch.setattr(linear, "_seconds", seconds)
    for each in pair:
        each.requires_grad_(False)
    batch = family.batch(model)
    exact = output_of(copy.deepcopy(model).double(), double(batch))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        expected, actual = (output_of(each, batch) for each in pair)
    assert taken(accelerated) <= FAST
    torch.testing.assert_close(output_of(accelerated, batch), output_of(accelerated, batch), rtol=0, atol=0)
    assert actual.dtype == expected.dtype
    real = real_positions(actual)
    errors = [(each.double() - exact)[real].square().mean().sqrt() for each in (expected, actual)]
    assert 0 < errors[1] <= 1.3 * errors[0]  # two ways of rounding, each of a few hundred values
    with torch.no_grad():  # and float32 again without it
        assert_same(output_of(accelerated, batch), output_of(model, batch))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad mode"])
def test_autocast_to_float16_and_training_under_autocast(family, pair, grad):
    batch = family.batch(pair[0])
    for dtype, requires_grad in ((torch.float16, False), (torch.bfloat16, True)):
        for each in pair:
            each.requires_grad_(requires_grad)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype):
            expected, actual = (output_of(each, batch) for each in pair)
        assert actual.dtype == expected.dtype
        assert_same(actual.float(), expected.float(), 0.1)


@pytest.mark.parametrize("faster", ["itself", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_checkpoints(family, dtype, faster, monkeypatch):
    seconds = {}
    for kind in (dtype, torch.float32):
        for sizes in ((32, 96), (32, 32), (32, 64), (64, 32)):
            seconds[LinearShape(kind, *sizes)] = 1.0 + (kind != (dtype if faster == "itself" else faster))
    monkeypatch.setattr(linear, "_seconds", seconds)
    model = family.build().to(dtype)
    accelerated = accelerate(copy.deepcopy(model), padding="skip")
    exact_model = copy.deepcopy(model).double()
    errors = torch.zeros(8, 2, dtype=torch.float64)  # of several batches: those of one are of a few values
    for row in errors:
        batch = double(family.batch(model), dtype)
        expected, actual = output_of(model, batch), output_of(accelerated, batch)
        exact = output_of(exact_model, double(batch))
        clamps = family.clamps_float16 and dtype == torch.float16
        paths = {("original", "float16 outputs are clamped")} if clamps else FAST
        assert actual.dtype == expected.dtype and taken(accelerated) <= paths
        real = real_positions(actual)
        row.copy_(torch.stack([(each.double() - exact)[real].square().mean() for each in (expected, actual)]))
    theirs, ours = errors.mean(0).sqrt()
    assert ours <= 1.05 * theirs


def real_positions(output: torch.Tensor) -> torch.Tensor:
    return MASK.bool() if output.shape[:2] == MASK.shape else torch.ones(output.shape[:2], dtype=torch.bool)


def double(batch: tuple[tuple, dict], dtype: torch.dtype = torch.float64) -> tuple[tuple, dict]:
    args, kwargs = batch
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in args), kwargs


@pytest.mark.parametrize("multiplied", ["itself", torch.float32])
@pytest.mark.parametrize("mode", ["bfloat16", "float16", "autocast"])
@torch.no_grad()
def test_what_a_cache_holds(mode, multiplied, monkeypatch):
    """Is of the original's dtype, so that either model goes on with it, in any mode."""
    dtype = torch.float32 if mode == "autocast" else getattr(torch, mode)
    half = torch.bfloat16 if mode == "autocast" else dtype
    seconds = {}
    for kind in (half, torch.float32):
        for sizes in ((32, 96), (32, 32), (32, 64), (64, 32), (32, 128), (128, 32)):
            seconds[LinearShape(kind, *sizes)] = 1.0 + (kind != (half if multiplied == "itself" else multiplied))
    monkeypatch.setattr(linear, "_seconds", seconds)
    model = FAMILIES["GPT-2"].build().to(dtype)
    accelerated, ids = accelerate(copy.deepcopy(model)), torch.randint(3, 100, (2, 7))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        expected, actual = model(ids, use_cache=True), accelerated(ids, use_cache=True)
        assert taken(accelerated) <= FAST
        for ours, theirs in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
            assert ours.keys.dtype == theirs.keys.dtype == half and ours.values.dtype == half
        following = model(ids[:, :1], past_key_values=actual.past_key_values)[0]
        with torch.enable_grad():
            ours = accelerated(ids[:, :1], past_key_values=expected.past_key_values)[0]
    torch.testing.assert_close(ours.float(), following.float(), rtol=0.1, atol=0.1)
