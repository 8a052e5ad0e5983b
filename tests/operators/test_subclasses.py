# SPDX-License-Identifier: BSD-3-Clause
"""Tensors with their own idea of an operator: what does not know this package's is computed as torch.nn computes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils._pytree import tree_map

from resnorm_ext import accelerate, functional
from resnorm_ext.modules import AddLayerNorm, LayerNorm, TransformerEncoderLayer

from .cases import CASES, EPS, FULL_CASES, SEED, TORCH_ACTIVATIONS, require_grad


class ByDispatch(Tensor):
    """Holds another tensor, and computes ATen's operators alone, below autograd."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> ByDispatch:
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if operator.namespace != "aten":
            raise NotImplementedError(f"unknown: {operator}")
        args, kwargs = tree_map(lambda each: each.held if isinstance(each, cls) else each, (args, kwargs or {}))
        return tree_map(lambda each: cls(each) if isinstance(each, Tensor) else each, operator(*args, **kwargs))

    @classmethod
    def of(cls, tensor: Tensor) -> ByDispatch:
        return cls(tensor.detach())

    def plain(self) -> Tensor:
        return self.held


class ByFunction(Tensor):
    """Computes torch's own functions alone."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "resnorm" in str(function):
            return NotImplemented
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def of(cls, tensor: Tensor) -> ByFunction:
        return tensor.as_subclass(cls)

    def plain(self) -> Tensor:
        return self.as_subclass(Tensor)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", [ByDispatch, ByFunction])
def test_a_subclass_that_knows_torchs_functions_alone(kind, case):
    """Whichever argument it is."""
    inputs = case.make_inputs((5, 8))
    expected = case.ours(inputs)
    for name in inputs:
        results = case.ours(inputs | {name: kind.of(inputs[name])})
        assert type(results[0]) is kind
        for result, other in zip(results, expected, strict=True):
            result = result.plain() if isinstance(result, kind) else result  # a sum knows nothing of the weight
            torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_its_gradients(case):
    gradients = []
    for kind in (ByFunction, Tensor):
        leaves = require_grad(case.make_inputs((5, 8)))
        results = case.ours({name: tensor.as_subclass(kind) for name, tensor in leaves.items()})
        torch.autograd.backward(results, [torch.cos(result.detach().as_subclass(Tensor)) for result in results])
        gradients.append([leaf.grad for leaf in leaves.values()])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual.as_subclass(Tensor), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [ByDispatch, ByFunction])
def test_its_dtypes_and_products(kind):
    half, weight = torch.randn(5, 8).bfloat16(), torch.randn(8).bfloat16()
    y, s = functional.add_layer_norm(kind.of(half), half, (8,), weight, prenorm=True, residual_dtype=torch.float32)
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    for activation, function in [("none", lambda x: x), ("relu", F.relu), ("gelu", F.gelu)]:
        with torch.no_grad():
            result = functional.linear(kind.of(x), weight, activation=activation)
        torch.testing.assert_close(result.plain(), function(x @ weight.T))
    for activation in ("swish", "none"):
        with pytest.raises(ValueError, match="expected activation"):
            functional.bias_activation(kind.of(x), None, activation)


@pytest.mark.parametrize("case", [case for case in CASES if case.dropout_p], ids=str)
def test_its_dropout_is_torchs_where_no_seed_is_given(case):
    inputs = case.make_inputs((5, 8))
    torch.manual_seed(3)
    results = case.ours({name: ByFunction.of(tensor) for name, tensor in inputs.items()}, seed=None)
    torch.manual_seed(3)
    if case.activates:
        activated = TORCH_ACTIVATIONS[case.activation](inputs["input"] + inputs.get("bias", 0.0))
        torch.testing.assert_close(results[0].plain(), F.dropout(activated, case.dropout_p), rtol=1e-5, atol=1e-5)
        return
    update = F.dropout(inputs["input"] + inputs.get("input_bias", 0.0), case.dropout_p)
    s = inputs["residual"] + update
    weight, bias = inputs.get("weight"), inputs.get("bias")
    y = F.layer_norm(s, (8,), weight, bias) if case.centered else F.rms_norm(s, (8,), weight, EPS)
    expected = {"s": s, "y": y}
    for name, result in zip(case.outputs, results, strict=True):
        torch.testing.assert_close(result.plain(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [ByDispatch, ByFunction])
def test_what_is_refused(kind):
    x = kind.of(torch.randn(5, 8))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        functional.layer_norm(x, (7,))
    with pytest.raises((NotImplementedError, TypeError)):
        functional.layer_norm(x, (8,), out=torch.empty(5, 8))


@pytest.mark.parametrize("kind", [ByDispatch, ByFunction])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "training": True, "seed": SEED}], ids=["", "dropout"])
def test_packed_attention(kind, causal, options):
    qkv, bounds = torch.randn(9, 3, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    expected = functional.packed_attention(qkv, bounds, causal=causal, **options)
    result = functional.packed_attention(kind.of(qkv), bounds, causal=causal, **options)
    torch.testing.assert_close(result.plain() if isinstance(result, kind) else result, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_packed_attention():
    gradients, bounds = [], torch.tensor([0, 4, 9], dtype=torch.int32)
    leaf = torch.randn(9, 3, 2, 8, requires_grad=True)
    for kind in (ByFunction, Tensor):
        output = functional.packed_attention(leaf.as_subclass(kind), bounds, dropout_p=0.3, training=True, seed=SEED)
        gradients.append(torch.autograd.grad(output.as_subclass(Tensor).square().sum(), leaf)[0])
    torch.testing.assert_close(gradients[0].as_subclass(Tensor), gradients[1], rtol=1e-4, atol=1e-5)


def test_attentions_dropout_is_torchs_where_no_seed_is_given():
    """Of equal weights and of values that are ones, so that what is kept shows in the sums."""
    qkv, bounds = torch.zeros(200, 3, 2, 8), torch.tensor([0, 100, 200], dtype=torch.int32)
    qkv[:, 2] = 1
    output = functional.packed_attention(ByFunction.of(qkv), bounds, dropout_p=0.5, training=True).plain()
    kept = output / 2 * 100
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert 45 < kept.mean() < 55 and kept.std() > 1
    with torch.no_grad():
        assert torch.equal(functional.packed_attention(ByFunction.of(qkv), bounds, dropout_p=0.5).plain(), qkv[:, 2])


def test_the_lack_of_an_extension_is_no_refusal(monkeypatch):
    class Absent:
        def __getattr__(self, name: str) -> object:
            raise ImportError("no C++ extension")

    monkeypatch.setattr(functional, "extension", Absent())
    with pytest.raises(ImportError, match=r"no C\+\+ extension"):
        functional.layer_norm(ByDispatch.of(torch.randn(5, 8)), (8,))


class Residual(nn.Module):
    """``norm(x, x)``, or of torch's norm ``norm(x + x)``."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, x) if isinstance(self.norm, AddLayerNorm) else self.norm(x + x)


@pytest.mark.parametrize(
    "ours",
    [
        nn.Sequential(LayerNorm(8), nn.Linear(8, 4)),
        accelerate(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))),
        Residual(AddLayerNorm(8)),
    ],
    ids=["LayerNorm", "accelerated", "AddLayerNorm"],
)
def test_per_sample_gradients(ours):
    """By ExpandedWeights, which know layer_norm, linear and a few more by name."""
    stock = Residual(nn.LayerNorm(8)) if isinstance(ours, Residual) else nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    x = torch.randn(4, 3, 8)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    stock.load_state_dict(ours.state_dict())
    for model in (ours, stock):
        call_for_per_sample_grads(model, loss_reduction="sum")(x).sin().sum().backward()
    for actual, expected in zip(ours.parameters(), stock.parameters(), strict=True):
        assert actual.grad_sample.shape == (4, *actual.shape)
        torch.testing.assert_close(actual.grad_sample, expected.grad_sample)


LAYOUTS = pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)


def nested(layout: torch.layout) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(length, 8, generator=generator) for length in (2, 5, 3)]
    return torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)


def parts(tensor: Tensor) -> list[Tensor]:
    return list(tensor.detach().unbind())


@LAYOUTS
def test_layer_norm_of_nested_tensors(layout):
    weight, bias = torch.randn(2, 8)
    outcomes = []
    for layer_norm in (functional.layer_norm, F.layer_norm):
        x, scale = nested(layout), weight.clone().requires_grad_()
        y = layer_norm(x, (8,), scale, bias)
        y.sin().to_padded_tensor(0.0).sum().backward()
        outcomes.append([*parts(y), *parts(x.grad), scale.grad])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected)


@LAYOUTS
def test_modules_on_nested_tensors(layout):
    x, norm, add_norm = nested(layout), LayerNorm(8), AddLayerNorm(8, prenorm=True)
    residual = x.relu()
    y, s = add_norm(x, residual)
    for row, other, normed, added, total in zip(*map(parts, (x, residual, norm(x), y, s)), strict=True):
        torch.testing.assert_close(normed, F.layer_norm(row, (8,)))
        torch.testing.assert_close(added, F.layer_norm(row + other, (8,)))
        torch.testing.assert_close(total, row + other)
    with pytest.raises(NotImplementedError, match="layer_norm: with out"), torch.no_grad():
        functional.layer_norm(x, (8,), out=torch.empty_like(x))


def test_compiled_modules_on_jagged_tensors():
    x = nested(torch.jagged)
    y = torch.compile(LayerNorm(8), backend="eager", fullgraph=True)(x)
    for row, normed in zip(parts(x), parts(y), strict=True):
        torch.testing.assert_close(normed, F.layer_norm(row, (8,)))


def test_integers_of_numpy():
    """Sizes that a program has computed with NumPy, as torch takes them."""
    x, width = torch.randn(2, 8), np.int64(8)
    expected = functional.layer_norm(x, (8,))
    assert torch.equal(functional.layer_norm(x, (width,)), expected)
    assert torch.equal(functional.layer_norm(x, (width,), out=torch.empty_like(x)), expected)
    assert torch.equal(functional.add_layer_norm(x, torch.zeros_like(x), (width,)), expected)
    assert torch.equal(LayerNorm(width)(x), expected)
    assert torch.equal(accelerate(nn.Sequential(nn.LayerNorm(np.prod((2, 4)))))(x), expected)
    layer = TransformerEncoderLayer(width, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        assert layer(x[None]).shape == (1, 2, 8)
    for wrong in [(8.0,), (np.float64(8),), ("8",), 8.0]:
        with pytest.raises(TypeError):
            functional.layer_norm(x, wrong)
