# SPDX-License-Identifier: BSD-3-Clause
"""torch.fx, torch.jit.script and torch.jit.trace: what they make of torch.nn's modules, they make of ours."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import resnorm_ext
import resnorm_ext.modules as rn
from resnorm_ext import functional as rf

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'norm' was found in ScriptModule constants"),  # torch.nn's encoder says so
    pytest.mark.filterwarnings("ignore:The TorchScript type system"),  # of every module that torch.fx makes
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:torch.nn.functional"),
]

BATCH, LENGTH, DIM, HEADS = 3, 5, 8, 2
PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]], dtype=torch.bool)
OTHER_PADDING = PADDING.roll(1, 0)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def layer(**options) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(DIM, HEADS, 12, **({"batch_first": True} | options))


STOCK = {
    "norm": lambda: nn.LayerNorm(DIM),
    "norm without bias": lambda: nn.LayerNorm((LENGTH, DIM), bias=False),
    "RMS norm": lambda: nn.RMSNorm(DIM),
    "post-norm layer": layer,
    "pre-norm layer": lambda: layer(norm_first=True, activation="gelu"),
    "encoder": lambda: nn.TransformerEncoder(layer(), 2, nn.LayerNorm(DIM), enable_nested_tensor=False),
    "length-first encoder": lambda: nn.TransformerEncoder(layer(batch_first=False), 1, enable_nested_tensor=False),
}
ENCODERS = [name for name in STOCK if "layer" in name or "encoder" in name]


class Net(nn.Module):
    """``inner`` as a part of something, which takes it for a single-input module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


class Masked(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.inner(x, src_key_padding_mask=padding)


def pair(name: str, wrap: type[nn.Module] = Net) -> tuple[nn.Module, nn.Module]:
    """A model of torch.nn with random parameters in inference mode, and its accelerated copy."""
    model = wrap(STOCK[name]()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, resnorm_ext.accelerate(copy.deepcopy(model))


def reloaded(scripted: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """As it comes back from its file; it holds nothing that asks for this package's operators."""
    assert "resnorm::" not in str(scripted.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def is_accelerated(model: nn.Module) -> bool:
    """Whether ``model.inner`` is what accelerate() made it."""
    return type(model.inner).__module__.startswith("resnorm_ext.")


def x() -> Tensor:
    return torch.randn(BATCH, LENGTH, DIM)


# torch.fx


@pytest.mark.parametrize("name", STOCK)
def test_fx_keeps_the_modules_that_it_keeps_of_torch_nn(name):
    stock, accelerated = pair(name)
    expected, traced = torch.fx.symbolic_trace(stock), torch.fx.symbolic_trace(accelerated)
    assert [(node.op, node.target) for node in traced.graph.nodes] == [
        (node.op, node.target) for node in expected.graph.nodes
    ]
    assert traced.inner is accelerated.inner and is_accelerated(traced)
    inputs = x()
    torch.testing.assert_close(traced(inputs), stock(inputs), **TOLERANCE)


def test_fx_traces_through_what_it_traces_through_of_torch_nn():
    class NoLeaves(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    stock, accelerated = pair("norm")
    graphs = [NoLeaves().trace(model) for model in (stock, accelerated)]
    assert torch.nn.functional.layer_norm in [node.target for node in graphs[1].nodes]
    assert [node.target for node in graphs[0].nodes] == [node.target for node in graphs[1].nodes]
    inputs = x()
    torch.testing.assert_close(torch.fx.GraphModule(accelerated, graphs[1])(inputs), stock(inputs), **TOLERANCE)


class Shifted(rn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


def test_fx_records_once_what_runs_around_a_forward():
    hooked = rn.LayerNorm(DIM)
    hooked.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    inputs = x()
    for inner in (Shifted(DIM), hooked):
        net = Net(inner)
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(inputs), net(inputs), **TOLERANCE)


def test_fx_of_a_module_for_itself():
    stock, accelerated = nn.LayerNorm(DIM), rn.LayerNorm(DIM)
    graphs = [torch.fx.symbolic_trace(module).graph for module in (stock, accelerated)]
    assert [node.target for node in graphs[0].nodes] == [node.target for node in graphs[1].nodes]


def test_fx_of_a_layer_with_its_masks_and_sequences():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = rn.TransformerEncoderLayer(DIM, HEADS, 12, batch_first=True).eval()

        def forward(self, x, padding, tokens, cu_seqlens):
            return self.layer(x, src_key_padding_mask=padding), self.layer(tokens, cu_seqlens=cu_seqlens)

    module, cu_seqlens = Calls(), torch.tensor([0, 2, LENGTH], dtype=torch.int32)
    inputs = x(), PADDING, torch.randn(LENGTH, DIM), cu_seqlens
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(*inputs), module(*inputs), rtol=0, atol=0)


class OwnModules(nn.Module):
    """Those that torch.nn does not have, or not with these arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = rn.FeedForward(DIM, 12, 0.1, "gelu")
        self.add_norm = rn.AddLayerNorm(DIM, dropout_p=0.1)
        self.add_norm_and_sum = rn.AddLayerNorm(DIM, prenorm=True)
        self.add_rms_norm = rn.AddRMSNorm(DIM, prenorm=True)
        self.attention = rn.SelfAttention(DIM, HEADS, batch_first=True)
        self.bias = nn.Parameter(torch.randn(DIM))

    def forward(self, x):
        y = self.add_norm(self.feed_forward(x), x)
        y, total = self.add_norm_and_sum(self.attention(y, is_causal=True)[0], y, self.bias)
        y, total = self.add_rms_norm(y, total)
        return y + total


class Functionals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(DIM)), nn.Parameter(torch.randn(DIM))
        self.projection = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x):
        y = rf.layer_norm(x, [8], self.weight, self.bias)
        y, total = rf.add_layer_norm(
            y,
            x,
            [8],
            self.weight,
            self.bias,
            input_bias=self.bias,
            dropout_p=0.5,
            training=self.training,
            prenorm=True,
        )
        y = rf.add_layer_norm(y, total, [8], self.weight)
        y = rf.add_rms_norm(rf.rms_norm(y, [8], self.weight), y, [8], self.weight)
        y = rf.residual_add(y, total, self.bias, dropout_p=0.5, training=self.training)
        y = rf.bias_activation(y, self.bias, "gelu_tanh")
        return rf.linear(y, self.projection, activation="relu") + total


@pytest.mark.parametrize("kind", [OwnModules, Functionals])
def test_own_modules_and_functionals(kind):
    """Recorded by each in turn, and by one after the other."""
    module, inputs = kind().eval(), x()
    expected = module(inputs)
    traced = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(traced(inputs), expected, **TOLERANCE)
    torch.testing.assert_close(reloaded(torch.jit.trace(module, (inputs,)))(inputs), expected, **TOLERANCE)
    if kind is OwnModules:  # TorchScript compiles no functions with keyword-only arguments
        torch.testing.assert_close(reloaded(torch.jit.script(module))(inputs), expected, **TOLERANCE)
    torch.testing.assert_close(module(inputs), expected, rtol=0, atol=0)


def test_fx_of_functionals_draws_a_seed_at_every_call():
    module = torch.fx.symbolic_trace(Functionals().train())
    inputs = x()
    first, second = module(inputs), module(inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    first = module(inputs)
    torch.manual_seed(1)
    assert torch.equal(module(inputs), first)


def test_fx_of_packed_attention():
    class Attend(nn.Module):
        def forward(self, qkv, cu_seqlens):
            return rf.packed_attention(qkv, cu_seqlens, causal=True)

    qkv, cu_seqlens = torch.randn(9, 3, HEADS, 4), torch.tensor([0, 4, 9], dtype=torch.int32)
    expected = Attend()(qkv, cu_seqlens)
    torch.testing.assert_close(torch.fx.symbolic_trace(Attend())(qkv, cu_seqlens), expected, rtol=0, atol=0)
    recorded = reloaded(torch.jit.trace(Attend(), (qkv, cu_seqlens)))
    for bounds in (cu_seqlens, torch.tensor([0, 7, 9], dtype=torch.int32)):
        torch.testing.assert_close(recorded(qkv, bounds), Attend()(qkv, bounds), **TOLERANCE)


# torch.jit.script


@pytest.mark.parametrize("name", STOCK)
def test_script(name):
    stock, accelerated = pair(name)
    inputs = x()
    expected = torch.jit.script(stock)(inputs)
    scripted = torch.jit.script(accelerated)
    torch.testing.assert_close(scripted(inputs), expected, **TOLERANCE)
    torch.testing.assert_close(reloaded(scripted)(inputs), expected, **TOLERANCE)
    torch.testing.assert_close(stock(inputs), expected, **TOLERANCE)
    assert is_accelerated(accelerated)
    torch.testing.assert_close(accelerated(inputs), expected, **TOLERANCE)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [name for name in ENCODERS if "length" not in name])
def test_script_with_padding(name, grad):
    stock, accelerated = pair(name, Masked)
    inputs = x()
    with torch.set_grad_enabled(grad):
        scripted = torch.jit.script(accelerated)
        for padding in (PADDING, OTHER_PADDING):
            torch.testing.assert_close(scripted(inputs, padding), torch.jit.script(stock)(inputs, padding), **TOLERANCE)


def test_script_of_a_training_step():
    stock, accelerated = pair("norm")
    inputs = x()
    results = []
    for module in (stock, torch.jit.script(accelerated)):
        module.zero_grad()
        module(inputs).square().sum().backward()
        results.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(results[0], results[1], **TOLERANCE)


def test_script_takes_no_packed_sequences():
    scripted = torch.jit.script(rn.TransformerEncoderLayer(DIM, HEADS, 12))
    with pytest.raises(torch.jit.Error, match="TorchScript computes no packed sequences"):
        scripted(torch.randn(4, DIM), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_trace_of_functionals_in_other_dtypes(dtype):
    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return rf.add_layer_norm(x, residual, [8], weight, bias, input_bias=bias, prenorm=True)

    half = dtype == torch.bfloat16
    residual = torch.randn(4, DIM, dtype=torch.float32 if half else dtype)
    parameters = [torch.randn(DIM, dtype=torch.float32 if half else dtype) for _ in range(2)]
    arguments = torch.randn(4, DIM, dtype=dtype), residual, *parameters
    expected = add_norm(*arguments)
    actual = torch.jit.trace(add_norm, arguments)(*arguments)
    assert [each.dtype for each in actual] == [each.dtype for each in expected]
    torch.testing.assert_close(actual, expected, rtol=1e-2 if half else 1e-12, atol=1e-2 if half else 1e-12)


# torch.jit.trace


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ENCODERS)
def test_trace_does_not_depend_on_the_mask(name, grad):
    stock, accelerated = pair(name, Masked)
    shape = (LENGTH, BATCH, DIM) if "length" in name else (BATCH, LENGTH, DIM)
    inputs = torch.randn(shape)
    with torch.set_grad_enabled(grad):
        # Its own check would complain: without grad, padded positions are zeros in a call that is not recorded.
        traced = reloaded(torch.jit.trace(accelerated, (inputs, PADDING), check_trace=False))
        for padding in (PADDING, OTHER_PADDING):
            torch.testing.assert_close(traced(inputs, padding), stock(inputs, padding), **TOLERANCE)
    assert is_accelerated(accelerated)


@pytest.mark.parametrize("name", ["norm", "norm without bias"])
def test_trace_of_a_norm(name):
    stock, accelerated = pair(name)
    traced = reloaded(torch.jit.trace(accelerated, (x(),)))
    inputs = x()
    torch.testing.assert_close(traced(inputs), stock(inputs), **TOLERANCE)


def test_trace_does_not_take_torch_nns_fast_path():
    """It is for what can be told by a call's values, and neither recorded nor the same at padding."""
    stock, accelerated = pair("encoder", Masked)
    inputs = x()
    with torch.no_grad():
        expected = stock(inputs, PADDING)
        torch.backends.mha.set_fastpath_enabled(True)
        traced = torch.jit.trace(accelerated, (inputs, PADDING), check_trace=False)
        assert torch.backends.mha.get_fastpath_enabled()
        torch.testing.assert_close(traced(inputs, PADDING), expected, **TOLERANCE)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = rn.TransformerEncoder(rn.TransformerEncoderLayer(DIM, HEADS, 12), 2).eval()

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.encoder(tokens, cu_seqlens=cu_seqlens)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:resnorm_ext.modules.attention")  # checks the width
def test_trace_of_packed_sequences():
    module, tokens = Packed(), torch.randn(9, DIM)
    traced = reloaded(torch.jit.trace(module, (tokens, torch.tensor([0, 4, 9], dtype=torch.int32))))
    other = torch.tensor([0, 2, 9], dtype=torch.int32)
    torch.testing.assert_close(traced(tokens, other), module(tokens, other), **TOLERANCE)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:resnorm_ext.reference")  # the rate, which is constant
def test_trace_with_dropout_under_a_seed():
    """A seed says which elements are dropped, whoever computes."""

    def add(x: Tensor, seed: Tensor) -> Tensor:
        return rf.residual_add(x, x, dropout_p=0.5, training=True, seed=seed)

    inputs = x()
    traced = torch.jit.trace(add, (inputs, torch.tensor(1)))
    for seed in (torch.tensor(1), torch.tensor(2)):
        torch.testing.assert_close(traced(inputs, seed), add(inputs, seed), **TOLERANCE)
