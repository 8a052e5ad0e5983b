# SPDX-License-Identifier: BSD-3-Clause
"""The linear layers of the modules in inference: measured once for a shape, prepared, and never out of date."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import resnorm_ext.modules as rn
from resnorm_ext.build.extension import extension, load_extension
from resnorm_ext.engine import linear as engine
from resnorm_ext.engine import prepared
from resnorm_ext.engine.linear import LinearShape
from resnorm_ext.modules import linear

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums of a few dozen terms near 1, in two orders


@pytest.fixture
def measured(monkeypatch):
    shapes = []
    for module in (linear, prepared):
        monkeypatch.setattr(module, "choose_backends", shapes.extend)
    return shapes


@torch.no_grad()
def test_each_shape_is_measured_once(measured):
    encoder = rn.TransformerEncoder(rn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
    for length in (3, 4):
        encoder(torch.randn(2, length, 8))
    assert measured == [LinearShape(torch.float32, *sizes) for sizes in ((8, 24), (8, 8), (8, 12), (12, 8))] * 2


@torch.no_grad()
def test_nothing_is_measured_where_results_must_repeat(monkeypatch):
    measured = []
    monkeypatch.setattr(engine, "_times", lambda shapes, names: measured.extend(shapes) or dict.fromkeys(names, 1.0))
    torch.use_deterministic_algorithms(True)
    try:
        rn.FeedForward(9, 13)(torch.randn(2, 9))
    finally:
        torch.use_deterministic_algorithms(False)
    assert measured == []
    rn.FeedForward(9, 13)(torch.randn(2, 9))
    assert len(measured) == 2


@torch.no_grad()
def test_measuring_takes_no_random_numbers_of_the_caller():
    module, x = rn.FeedForward(20, 28, 0.0), torch.randn(2, 20)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    module(x)
    assert torch.equal(torch.randn(4), expected)


@pytest.fixture(params=["aten", "onednn", "resnorm"])
def feed_forward(request, measured):
    """Of a shape that no other test has, computed by one of the libraries."""
    load_extension()
    if request.param not in extension.linear_backends(torch.float32):
        pytest.skip("this PyTorch or CPU has no oneDNN linear")
    shapes = [(torch.float32, 24, 36), (torch.float32, 36, 24)]
    for shape in shapes:
        extension.set_linear_backend(*shape, request.param)
    yield rn.FeedForward(24, 36, 0.0, "gelu")
    for shape in shapes:
        extension.set_linear_backend(*shape, "aten")


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (2, 0), (70,)], ids=str)
@torch.no_grad()
def test_any_number_of_rows(feed_forward, shape):
    x = torch.randn(*shape, 24)
    torch.testing.assert_close(feed_forward(x), expected_of(feed_forward, x), **TOLERANCE)
    strided = torch.randn(24, *shape).movedim(0, -1)
    torch.testing.assert_close(feed_forward(strided), expected_of(feed_forward, strided), **TOLERANCE)


def expected_of(module, x):
    return F.linear(F.gelu(F.linear(x, module.linear1.weight, module.linear1.bias)), *module.linear2.parameters())


@torch.no_grad()
def test_changed_weights_take_effect(feed_forward):
    x = torch.randn(5, 24)
    torch.testing.assert_close(feed_forward(x), expected_of(feed_forward, x), **TOLERANCE)
    feed_forward.linear1.weight.mul_(2.0)
    torch.testing.assert_close(feed_forward(x), expected_of(feed_forward, x), **TOLERANCE)
    feed_forward.linear2.weight = torch.nn.Parameter(torch.randn(24, 36))
    torch.testing.assert_close(feed_forward(x), expected_of(feed_forward, x), **TOLERANCE)
    feed_forward.load_state_dict({name: 1.5 * value for name, value in feed_forward.state_dict().items()})
    torch.testing.assert_close(feed_forward(x), expected_of(feed_forward, x), **TOLERANCE)


def test_training_and_inference_in_turns(feed_forward):
    optimizer = torch.optim.SGD(feed_forward.parameters(), 0.1)
    for _ in range(3):
        x = torch.randn(5, 24)
        optimizer.zero_grad()
        feed_forward(x).square().sum().backward()
        optimizer.step()
        assert all(parameter.grad.abs().max() > 0 for parameter in feed_forward.parameters())
        with torch.no_grad():
            torch.testing.assert_close(feed_forward(x), expected_of(feed_forward, x), **TOLERANCE)


@pytest.mark.parametrize(("width", "dtype"), [(23, torch.float32), (24, torch.bfloat16), (24, torch.float64)], ids=str)
@torch.no_grad()
def test_bad_input_raises_as_in_torch(feed_forward, width, dtype):
    x = torch.randn(5, width, dtype=dtype)
    with pytest.raises(RuntimeError):
        expected_of(feed_forward, x)
    with pytest.raises(RuntimeError):
        feed_forward(x)
