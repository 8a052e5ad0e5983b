# SPDX-License-Identifier: BSD-3-Clause
"""torch.onnx.export of accelerated models, of this package's modules and of its functionals, by both exporters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from onnx_export import EXPORTERS, export, run

import resnorm_ext
import resnorm_ext.modules as rn
from resnorm_ext import functional as rf

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:torch.nn.functional"),
    pytest.mark.filterwarnings("ignore:ONNX Preprocess - Removing mutation from node aten..masked_fill_:UserWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name. (batch|length) will not be used:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed. Please remove usage:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:copyreg"),
]

BATCH, LENGTH, DIM, HEADS = 3, 5, 8, 2
PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]], dtype=torch.bool)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

every_exporter = pytest.mark.parametrize("exporter", EXPORTERS)


def encoder(**options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 12, **({"batch_first": True} | options))
    return randomized(nn.TransformerEncoder(layer, 1, nn.LayerNorm(DIM), enable_nested_tensor=False)).eval()


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


class Masked(nn.Module):
    """``encoder`` with padding, with a causal mask and with neither."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, padding: Tensor, causal: Tensor) -> Tensor:
        plain, padded = self.encoder(x), self.encoder(x, src_key_padding_mask=padding)
        return torch.stack([plain, padded, self.encoder(x, causal, is_causal=True)])


def check(stock: nn.Module, accelerated: nn.Module, arguments: tuple[Tensor, ...], path, exporter: str, **options):
    """Exported and run, ``accelerated`` gives what ``stock`` gives; returns it exported."""
    with torch.no_grad():
        expected = stock.eval()(*arguments)
    exported = export(accelerated, arguments, path, exporter, **options)
    torch.testing.assert_close(run(exported, arguments), expected, **TOLERANCE)
    return exported


@every_exporter
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_layer_norm(options, exporter, tmp_path):
    stock = randomized(nn.LayerNorm((LENGTH, DIM), **options))
    accelerated = resnorm_ext.accelerate(copy.deepcopy(stock))
    exported = check(stock, accelerated, (torch.randn(BATCH, LENGTH, DIM),), tmp_path, exporter)
    assert "LayerNormalization" in [node.op_type for node in exported.graph.node]
    assert type(accelerated) is rn.LayerNorm


@every_exporter
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu", "batch_first": False}], ids=str)
def test_encoder(options, exporter, tmp_path):
    stock = Masked(encoder(**options))
    accelerated = resnorm_ext.accelerate(copy.deepcopy(stock))
    x = torch.randn(BATCH, LENGTH, DIM) if not options else torch.randn(LENGTH, BATCH, DIM)
    arguments = x, PADDING, nn.Transformer.generate_square_subsequent_mask(LENGTH)
    check(stock, accelerated, arguments, tmp_path, exporter)
    assert type(accelerated.encoder) is rn.TransformerEncoder


class Padded(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


def test_encoder_at_other_sizes_in_another_opset(tmp_path):
    """torch.nn's encoder as the other exporter records it holds the sizes of its example."""
    stock, sizes = Padded(encoder()), {0: "batch", 1: "length"}
    accelerated, arguments = resnorm_ext.accelerate(copy.deepcopy(stock)), (torch.randn(BATCH, LENGTH, DIM), PADDING)
    options = {"dynamic_shapes": (sizes, sizes), "opset_version": 18}
    exported = check(stock, accelerated, arguments, tmp_path, "by torch.export", **options)
    assert exported.opset_import[0].version == 18
    other = torch.randn(2, 7, DIM), torch.zeros(2, 7, dtype=torch.bool)
    other[1][0, 4:] = True
    with torch.no_grad():
        torch.testing.assert_close(run(exported, other), stock(*other), **TOLERANCE)


@pytest.mark.parametrize("opset", [14, 17])
def test_norm_at_other_sizes_in_other_opsets(opset, tmp_path):
    stock = randomized(nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM)))
    options = {"dynamic_axes": {"input_0": {0: "batch"}}, "opset_version": opset}
    accelerated = resnorm_ext.accelerate(copy.deepcopy(stock))
    exported = check(stock, accelerated, (torch.randn(3, DIM),), tmp_path, "by torch.jit.trace", **options)
    other = torch.randn(7, DIM)
    torch.testing.assert_close(run(exported, (other,)), stock(other).detach(), **TOLERANCE)


@every_exporter
def test_encoder_while_torch_nns_fast_path_is_on(exporter, tmp_path):
    """As by default. torch.nn's own encoder cannot be traced for ONNX then."""
    stock, x = encoder(), torch.randn(BATCH, LENGTH, DIM)
    with torch.no_grad():
        expected = stock(x)
        torch.backends.mha.set_fastpath_enabled(True)
        exported = export(resnorm_ext.accelerate(copy.deepcopy(stock)), (x,), tmp_path, exporter)
    torch.testing.assert_close(run(exported, (x,)), expected, **TOLERANCE)


class Functionals(nn.Module):
    """As a user's module calls them; in training there would be dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(DIM)), nn.Parameter(torch.randn(DIM))
        self.projection = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        drop = {"dropout_p": 0.5, "training": self.training}
        y = rf.layer_norm(x, (DIM,), self.weight, self.bias)
        y, total = rf.add_layer_norm(
            y, residual, (DIM,), self.weight, self.bias, input_bias=self.bias, prenorm=True, **drop
        )
        y = rf.residual_add(rf.add_layer_norm(y, total, (DIM,)), total, self.bias, **drop)
        y = rf.bias_activation(rf.bias_activation(y, self.bias, "gelu_tanh"), activation="gelu")
        return rf.linear(y, self.projection, self.bias, activation="relu") + total


class OwnModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = rn.FeedForward(DIM, 12, 0.1, "gelu")
        self.add_norm = rn.AddLayerNorm(DIM, dropout_p=0.1, prenorm=True)
        self.attention = rn.SelfAttention(DIM, HEADS, batch_first=True)
        self.layer = rn.TransformerEncoderLayer(DIM, HEADS, 12, batch_first=True)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y, total = self.add_norm(self.feed_forward(x), residual)
        y, weights = self.attention(y, is_causal=True)
        return self.layer(y, is_causal=True, src_mask=None) + total + weights.sum()


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = rn.TransformerEncoder(rn.TransformerEncoderLayer(DIM, HEADS, 12), 2)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.encoder(tokens, cu_seqlens=cu_seqlens)


OWN = {
    Functionals: lambda: (torch.randn(BATCH, LENGTH, DIM), torch.randn(BATCH, LENGTH, DIM)),
    OwnModules: lambda: (torch.randn(BATCH, LENGTH, DIM), torch.randn(BATCH, LENGTH, DIM)),
    Packed: lambda: (torch.randn(9, DIM), torch.tensor([0, 4, 9], dtype=torch.int32)),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:resnorm_ext.modules.attention")  # checks the width
@every_exporter
@pytest.mark.parametrize("kind", OWN)
def test_what_torch_nn_does_not_have(kind, exporter, tmp_path):
    module, arguments = kind().eval(), OWN[kind]()
    with torch.no_grad():
        expected = module(*arguments)
    torch.testing.assert_close(run(export(module, arguments, tmp_path, exporter), arguments), expected, **TOLERANCE)


def test_torch_export_keeps_this_packages_operators():
    """For whoever loads the program imports it; ONNX alone is a place without."""
    program = torch.export.export(rn.LayerNorm(DIM), (torch.randn(2, DIM),))
    assert torch.ops.resnorm.layer_norm.default in [node.target for node in program.graph.nodes]
