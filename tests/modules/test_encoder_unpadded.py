# SPDX-License-Identifier: BSD-3-Clause
"""Batches without padding: through this package's attention where it has a kernel."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import resnorm_ext
from resnorm_ext import functional

BATCH, LENGTH, DIM, HEADS = 3, 7, 32, 4


@pytest.fixture(params=[False, True], ids=["length first", "batch first"])
def batch_first(request) -> bool:
    return request.param


def build(batch_first: bool, norm_first: bool = False, dtype: torch.dtype = torch.float32) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 48, batch_first=batch_first, norm_first=norm_first, dtype=dtype)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def source(batch_first: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((BATCH, LENGTH, DIM) if batch_first else (LENGTH, BATCH, DIM)).to(dtype)


@pytest.fixture
def way(caplog):
    """``way(module, *arguments)``: what the call logs for itself, and its output."""

    def call(module, *arguments, **keywords):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "resnorm_ext"):
            output = module(*arguments, **keywords)
        return caplog.messages[0].partition(": ")[2].partition(", because")[0], output

    return call


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [None, torch.zeros(BATCH, LENGTH, dtype=torch.bool)], ids=["no mask", "of nothing"])
@torch.no_grad()
def test_is_torchs(batch_first, norm_first, causal, padding, way):
    encoder = build(batch_first, norm_first)
    accelerated, src = resnorm_ext.accelerate(copy.deepcopy(encoder)), source(batch_first)
    before = src.clone()
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None
    arguments = {"mask": mask, "src_key_padding_mask": padding}
    message, output = way(accelerated, src, **arguments)
    assert message == "packed"
    torch.testing.assert_close(output, encoder(src, **arguments), rtol=1e-5, atol=1e-5)
    assert torch.equal(src, before) and output.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_types_are_as_accurate(dtype, way):
    encoder = build(True, dtype=dtype)
    accelerated, src = resnorm_ext.accelerate(copy.deepcopy(encoder)), source(True, dtype)
    message, output = way(accelerated, src)
    assert message == "packed"
    exact = copy.deepcopy(encoder).double()(src.double())
    errors = [(each.double() - exact).pow(2).mean().sqrt() for each in (encoder(src), output)]
    assert errors[1] <= 1.1 * errors[0]


@torch.no_grad()
def test_an_unbatched_sequence(batch_first, way):
    encoder = build(batch_first)
    src = torch.randn(LENGTH, DIM)
    message, output = way(resnorm_ext.accelerate(copy.deepcopy(encoder)), src)
    assert message == "packed"
    torch.testing.assert_close(output, encoder(src), rtol=1e-5, atol=1e-5)


def test_masks_and_float64_are_not_for_the_kernel(monkeypatch, way):
    monkeypatch.setattr(functional, "packed_attention", lambda *_, **__: pytest.fail("packed"))
    encoder, src = resnorm_ext.accelerate(build(True)), source(True)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert way(encoder, src, torch.zeros(LENGTH, LENGTH))[0] == "padded"
            assert way(resnorm_ext.accelerate(build(True).double()), src.double())[0] == "padded"


@pytest.mark.parametrize("causal", [True, False])
def test_training_without_padding_is_packed(way, batch_first, causal):
    encoder, src = resnorm_ext.accelerate(build(batch_first)), source(batch_first)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None
    original = build(batch_first)
    original.load_state_dict(encoder.state_dict())
    for training in (False, True):
        assert way(encoder.train(training), src, mask)[0] == "packed"
    grads = []
    for model in (encoder.eval(), original.eval()):
        model(src, mask).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
