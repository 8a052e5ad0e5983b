# SPDX-License-Identifier: BSD-3-Clause
"""torch.ao.quantization, in eager mode and by torch.fx: an accelerated model becomes what the original becomes."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

tq = pytest.importorskip("torch.ao.quantization")
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx  # noqa: E402

import resnorm_ext  # noqa: E402
import resnorm_ext.modules as rn  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:must run observer before calling calculate_qparams:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning"),
]

BATCH, LENGTH, DIM, HEADS = 4, 5, 16, 2
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
ENGINES = torch.backends.quantized.supported_engines
BACKEND = "fbgemm" if "fbgemm" in ENGINES else "x86"
if BACKEND not in ENGINES:
    pytest.skip("this torch quantizes for no backend", allow_module_level=True)


class Net(nn.Module):
    """Takes a float and returns one; what is between runs on quantized tensors."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.quantize, self.dequantize = tq.QuantStub(), tq.DeQuantStub()
        self.linear, self.inner = nn.Linear(DIM, DIM), nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantize(self.inner(self.linear(self.quantize(x))))


class Attention(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class FeedForward(nn.Module):
    """What rn.FeedForward is made of, its parameters' names too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.dropout, self.linear2 = nn.Linear(DIM, 24), nn.Dropout(0.1), nn.Linear(24, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(nn.functional.relu(self.linear1(x))))


def static(model: nn.Module, x: Tensor) -> nn.Module:
    model = copy.deepcopy(model).eval()
    model.qconfig = tq.get_default_qconfig(BACKEND)
    prepared = tq.prepare(model)
    prepared(x)
    return tq.convert(prepared)


def aware(model: nn.Module, x: Tensor) -> nn.Module:
    """After a step of training with fake quantization."""
    model = copy.deepcopy(model).train()
    model.qconfig = tq.get_default_qat_qconfig(BACKEND)
    prepared = tq.prepare_qat(model)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    prepared(x).square().mean().backward()
    optimizer.step()
    prepared(x)
    return tq.convert(prepared.eval())


def static_by_fx(model: nn.Module, x: Tensor) -> nn.Module:
    model = copy.deepcopy(model).eval()
    prepared = prepare_fx(model, tq.get_default_qconfig_mapping(BACKEND), (x,))
    prepared(x)
    return convert_fx(prepared)


def aware_by_fx(model: nn.Module, x: Tensor) -> nn.Module:
    model = copy.deepcopy(model).train()
    prepared = prepare_qat_fx(model, tq.get_default_qat_qconfig_mapping(BACKEND), (x,))
    prepared(x)
    return convert_fx(prepared.eval())


def dynamic(model: nn.Module, x: Tensor) -> nn.Module:
    return tq.quantize_dynamic(model, {nn.Linear})


def check(stock: nn.Module, ours: nn.Module, quantize) -> nn.Module:
    """Both become the same; returns what ours has become."""
    ours.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(BATCH, LENGTH, DIM)
    torch.manual_seed(0)
    expected = quantize(stock, x)
    torch.manual_seed(0)
    actual = quantize(ours, x)
    with torch.no_grad():
        torch.testing.assert_close(actual(x), expected(x), **TOLERANCE)
        assert not torch.equal(actual(x), stock.eval()(x)), "nothing has been quantized"
    return actual


def randomized(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("quantize", [static, aware, static_by_fx, aware_by_fx, dynamic])
def test_layer_norm(quantize):
    stock = randomized(Net(nn.LayerNorm(DIM), nn.LayerNorm(DIM, bias=False)))
    accelerated = resnorm_ext.accelerate(copy.deepcopy(stock))
    quantized = check(stock, accelerated, quantize)
    assert (rn.LayerNorm in {type(module) for module in quantized.modules()}) == (quantize is dynamic)
    assert type(accelerated.inner[0]) is rn.LayerNorm


@pytest.mark.parametrize("quantize", [static, aware])
def test_modules_of_this_package(quantize):
    stock = randomized(Net(FeedForward(), nn.LayerNorm(DIM)))
    check(stock, Net(rn.FeedForward(DIM, 24), rn.LayerNorm(DIM)), quantize)


@pytest.mark.parametrize("quantize", [static, static_by_fx, dynamic])
def test_attention(quantize):
    stock = randomized(Net(Attention(nn.MultiheadAttention(DIM, HEADS, batch_first=True))))
    ours = Net(Attention(rn.SelfAttention(DIM, HEADS, batch_first=True)))
    quantized = check(stock, ours, quantize)
    assert (rn.SelfAttention in {type(module) for module in quantized.modules()}) == (quantize is not static)


def layer(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(DIM, HEADS, 24, dropout=0.0, batch_first=True, **options)


@pytest.mark.parametrize("quantize", [static_by_fx, dynamic])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=str)
def test_encoder(options, quantize):
    encoder = nn.TransformerEncoder(layer(**options), 2, nn.LayerNorm(DIM), enable_nested_tensor=False)
    stock = randomized(Net(encoder))
    check(stock, resnorm_ext.accelerate(copy.deepcopy(stock)), quantize)


class FloatAround(nn.Module):
    """An encoder layer some of whose parts are quantized, each with its own way in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()
        for name in ("linear1", "linear2", "norm1", "norm2"):
            setattr(self.layer, name, tq.QuantWrapper(getattr(self.layer, name)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("quantize", [static, aware])
def test_parts_of_an_encoder_layer(quantize):
    def of_parts(model: nn.Module, x: Tensor) -> nn.Module:
        model.layer.self_attn.qconfig = None
        return quantize(model, x)

    stock = randomized(FloatAround())
    check(stock, resnorm_ext.accelerate(copy.deepcopy(stock)), of_parts)


def test_fx_and_what_is_not_to_be_quantized():
    stock = randomized(Net(nn.LayerNorm(DIM)))

    def quantize(model: nn.Module, x: Tensor) -> nn.Module:
        mapping = tq.get_default_qconfig_mapping(BACKEND).set_module_name("inner.0", None)
        prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, (x,))
        prepared(x)
        return convert_fx(prepared)

    check(stock, resnorm_ext.accelerate(copy.deepcopy(stock)), quantize)


def test_tables_keep_what_torch_has_put_there():
    mappings = tq.quantization_mappings.DEFAULT_STATIC_QUANT_MODULE_MAPPINGS
    assert mappings[rn.LayerNorm] is mappings[nn.LayerNorm] is torch.ao.nn.quantized.LayerNorm
    observed = tq.get_default_custom_config_dict()["float_to_observed_custom_module_class"]
    assert observed[nn.MultiheadAttention] is torch.ao.nn.quantizable.MultiheadAttention
    assert issubclass(observed[rn.SelfAttention], torch.ao.nn.quantizable.MultiheadAttention)


def test_import_loads_nothing_of_the_library():
    names = "{name for name in sys.modules if name.startswith('torch.ao')}"
    program = f"import sys, torch; before = {names}; import resnorm_ext; print(sorted({names} - before))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
