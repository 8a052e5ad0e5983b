# SPDX-License-Identifier: BSD-3-Clause
"""Layers of users in torch.nn's encoder, and inputs and sizes of unusual kinds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import resnorm_ext.modules as rn
from resnorm_ext import functional
from resnorm_ext.integrations import accelerate

PADDING = torch.tensor([[0] * 8, [0] * 5 + [1] * 3]).bool()


class Own(nn.Module):
    """A layer of a user's own, whose result is something else."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.norm = nn.MultiheadAttention(32, 4, batch_first=True), nn.LayerNorm(32)

    def forward(self, src, src_mask=None, is_causal=None, src_key_padding_mask=None):
        output, weights = self.self_attn(src, src, src, key_padding_mask=src_key_padding_mask)
        return self.result(self.norm(src + output), weights)


class Halves(Own):
    def result(self, output, weights):
        return output[:, ::2]


class Narrower(Own):
    def result(self, output, weights):
        return output[..., :16]


class WithMap(Own):
    def result(self, output, weights):
        return output, weights


class AsDict(Own):
    def result(self, output, weights):
        return {"output": output, "weights": weights}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("padding", ["auto", "skip", "compute"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padding mask"])
@pytest.mark.parametrize("kind", [Halves, Narrower, WithMap, AsDict])
def test_layers_of_users(kind, padded, padding, grad):
    model, src = nn.TransformerEncoder(kind(), 1).eval(), torch.randn(2, 8, 32)
    accelerated = accelerate(copy.deepcopy(model), padding=padding)
    mask = PADDING if padded else None
    with torch.set_grad_enabled(grad):
        expected, actual = (each(src, src_key_padding_mask=mask) for each in (model, accelerated))
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("kind", ["layer", "encoder", "norm"])
def test_the_negative_bit(kind, norm_first, grad, padded):
    """Of the imaginary part of a conjugate: a view whose values are negated when they are read."""
    src = torch.fft.fft(torch.randn(2, 8, 32)).conj().imag
    assert src.is_neg()
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = {"layer": layer, "encoder": encoder, "norm": nn.LayerNorm(32)}[kind].eval()
    keywords = {"src_key_padding_mask": PADDING} if padded and kind != "norm" else {}
    with torch.set_grad_enabled(grad):
        expected = model(src, **keywords)
        for padding in ("skip", "compute"):
            actual = accelerate(copy.deepcopy(model), padding=padding)(src, **keywords)
            real = ~PADDING if keywords else torch.ones_like(PADDING)
            torch.testing.assert_close(actual[real], expected[real], rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_weights_with_the_negative_bit():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    for parameter in model.parameters():
        parameter.data = torch.complex(torch.zeros_like(parameter), -parameter).conj().imag
    assert all(parameter.is_neg() for parameter in model.parameters())
    src = torch.randn(2, 8, 32)
    torch.testing.assert_close(accelerate(copy.deepcopy(model))(src), model(src), rtol=2e-4, atol=2e-4)


SIZES = [np.int64(8), np.int32(8), np.prod((2, 4)), torch.tensor(8)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: type(size).__name__)
class TestIntegers:
    """numpy's, and tensors of no dimension, wherever torch.nn takes them."""

    def check(self, compiled, ours, theirs, *arguments):
        try:
            expected = theirs(*arguments)
        except Exception:
            pytest.skip("torch.nn does not take it")
        if compiled:
            try:
                torch.compile(theirs, backend="eager")(*arguments)
            except Exception:
                pytest.skip("torch.nn does not compile with it")
            ours = torch.compile(ours, backend="eager")
        torch.testing.assert_close(ours(*arguments), expected, rtol=1e-5, atol=1e-5)

    def test_functions(self, size, compiled):
        x = torch.randn(2, 8)
        norm = torch.nn.functional.layer_norm
        self.check(compiled, lambda x: functional.layer_norm(x, (size,)), lambda x: norm(x, (size,)), x)
        self.check(compiled, lambda x: functional.layer_norm(x, [size]), lambda x: norm(x, [size]), x)
        self.check(compiled, lambda x: functional.add_layer_norm(x, x, (size,)), lambda x: norm(x + x, (size,)), x)

    def test_modules(self, size, compiled):
        x = torch.randn(2, 8)
        for shape in ((size,),) if isinstance(size, torch.Tensor) else (size, (size,)):
            self.check(compiled, rn.LayerNorm(shape), nn.LayerNorm(shape), x)
            self.check(compiled, accelerate(nn.Sequential(nn.LayerNorm(shape))), nn.LayerNorm(shape), x)
            self.check(
                compiled, lambda x, s=shape: rn.AddLayerNorm(s)(x, x), lambda x, s=shape: nn.LayerNorm(s)(x + x), x
            )

    def test_encoders(self, size, compiled):
        if isinstance(size, torch.Tensor):
            pytest.skip("torch.nn does not take it")
        options = {"batch_first": True, "dropout": 0.0}
        theirs = nn.TransformerEncoderLayer(size, np.int64(2), np.int64(16), **options).eval()
        ours = rn.TransformerEncoderLayer(size, np.int64(2), np.int64(16), **options).eval()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 5, 8)
        with torch.no_grad():
            self.check(compiled, ours, theirs, x)
        self.check(compiled, ours, theirs, x)


@pytest.mark.parametrize("shape", [8, (8.0,), ("8",), None, (2**70,), ((8,),)], ids=str)
def test_what_is_no_shape(shape):
    with pytest.raises((TypeError, RuntimeError)):
        functional.layer_norm(torch.randn(2, 8), shape)
