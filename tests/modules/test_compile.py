# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile and export: one graph per module, forward and backward, that depends on no mask's values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import resnorm_ext.modules as rn

BATCH, LENGTH, DIM, HEADS = 2, 5, 8, 2
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32, in another order


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module):
    """Inductor's, in one graph; the counter tells a compiled call from a silent eager one."""
    torch._dynamo.utils.counters.clear()
    return torch.compile(module, fullgraph=True)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_gradients(module, x, expected, output):
    """Of ``x`` and every parameter, for one gradient of the output."""
    torch.testing.assert_close(output, expected, **TOLERANCE)
    targets, grad_output = [x, *module.parameters()], torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, targets, grad_output),
        torch.autograd.grad(expected, targets, grad_output),
        **TOLERANCE,
    )


class EachModuleOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = rn.LayerNorm(DIM)
        self.feed_forward = rn.FeedForward(DIM, 12, 0.0, "gelu")
        self.add_norm = rn.AddLayerNorm(DIM, prenorm=True)
        self.attention = rn.SelfAttention(DIM, HEADS, batch_first=True)
        self.layer = rn.TransformerEncoderLayer(DIM, HEADS, 12, 0.0, batch_first=True)

    def forward(self, x):
        y, total = self.add_norm(self.feed_forward(self.norm(x)), x)
        return self.layer(total + self.attention(y, y, y, need_weights=False)[0], is_causal=True)


def test_each_module_forward_and_backward():
    module = EachModuleOnce()
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    check_gradients(module, x, module(x), compiled(module)(x))
    assert graphs() == 1


def make_encoder():
    """A pre-norm layer, a post-norm one, and a final norm: all that the dataflow has."""
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True}
    encoder = rn.TransformerEncoder(
        rn.TransformerEncoderLayer(DIM, HEADS, 12, norm_first=True, **options), 2, rn.LayerNorm(DIM)
    )
    encoder.layers[1].norm_first = False
    return encoder


def test_encoder_with_two_padding_masks_in_one_graph():
    encoder = make_encoder()
    fast = compiled(encoder)
    paddings = torch.tensor([[[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], [[1, 0, 0, 0, 0], [0, 1, 0, 1, 0]]], dtype=torch.bool)
    for padding in (*paddings, torch.zeros_like(paddings[0])):
        x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
        expected, output = (module(x, src_key_padding_mask=padding) for module in (encoder, fast))
        check_gradients(encoder, x, expected, output)
    assert graphs() == 1


@torch.no_grad()
def test_encoder_without_grad_in_one_graph():
    encoder = make_encoder().eval()
    fast = compiled(encoder)
    for padding in torch.rand(3, BATCH, LENGTH) < 0.4:
        x = torch.randn(BATCH, LENGTH, DIM)
        torch.testing.assert_close(
            fast(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding), **TOLERANCE
        )
    assert graphs() == 1


def test_packed_input_in_one_graph():
    encoder = make_encoder()
    fast = compiled(encoder)
    for bounds in ([0, 3, 10], [0, 9, 10]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        x = torch.randn(10, DIM, requires_grad=True)
        expected, output = (m(x, cu_seqlens=cu_seqlens, max_seqlen=10, is_causal=True) for m in (encoder, fast))
        check_gradients(encoder, x, expected, output)
    assert graphs() == 1


@torch.no_grad()
def test_export_takes_any_mask():
    encoder = make_encoder().eval()
    x, paddings = torch.randn(BATCH, LENGTH, DIM), torch.rand(2, BATCH, LENGTH) < 0.4
    program = torch.export.export(encoder, (x, None, paddings[0]))
    for padding in paddings:
        torch.testing.assert_close(program.module()(x, None, padding), encoder(x, None, padding), **TOLERANCE)


@torch.no_grad()
def test_tracing_reads_no_mask():
    encoder = make_encoder().eval()
    x, paddings = torch.randn(BATCH, LENGTH, DIM), torch.rand(2, BATCH, LENGTH) < 0.4
    graph = make_fx(lambda x, padding: encoder(x, None, padding))(x, paddings[0])
    for padding in paddings:
        torch.testing.assert_close(graph(x, padding), encoder(x, None, padding), **TOLERANCE)
