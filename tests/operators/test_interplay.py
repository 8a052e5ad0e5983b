# SPDX-License-Identifier: BSD-3-Clause
"""What training code does around an operator."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from resnorm_ext.functional import add_layer_norm, layer_norm, residual_add

from .cases import FULL_CASES, require_grad


def step(case, inputs, call=None) -> list[torch.Tensor]:
    leaves = require_grad(inputs)
    outputs = (call or case.ours)(leaves)
    return [*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves.values())]


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(case, use_reentrant):
    names = tuple(case.make_inputs((2, 2)))

    def segment(*tensors):
        return case.ours(dict(zip(names, tensors, strict=True)), seed=None)

    results = []
    for call in (segment, lambda *tensors: checkpoint(segment, *tensors, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        leaves = require_grad(case.make_inputs((6, 21)))
        outputs = call(*leaves.values())
        sum(output.sin().sum() for output in outputs).backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_saved_tensors_can_be_moved_away_and_back(case):
    inputs, packed = case.make_inputs((6, 21)), []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.numpy().tobytes(), tensor.dtype, tensor.shape

    def unpack(saved):
        data, dtype, shape = saved
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)

    def call(leaves):
        with saved_tensors_hooks(lambda t: pack(t.detach()), unpack):
            return case.ours(leaves)

    expected = step(case, inputs)
    assert all(torch.equal(a, b) for a, b in zip(step(case, inputs, call), expected, strict=True))
    assert packed


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_nothing_of_the_size_of_the_input_is_saved_but_what_the_formula_needs(case):
    """layer_norm and bias_activation: the input. residual_add: nothing, no mask. add_layer_norm: the sum, which prenorm
    returns anyway."""
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        case.ours(require_grad(case.make_inputs((50, 21))))
    assert [numel for numel in saved if numel > 50 * 20] == [50 * 21] * (not case.operator == "residual_add")


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_anomaly_mode_and_deterministic_algorithms(case):
    inputs = case.make_inputs((6, 21))
    expected = step(case, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            assert all(torch.equal(a, b) for a, b in zip(step(case, inputs), expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_of_input_and_residual_are_two_tensors():
    """Without dropout they are equal: but who scales one in place must not scale the other."""
    x, r = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    for call in (residual_add, lambda x, r: add_layer_norm(x, r, (8,))):
        x.grad = r.grad = None
        call(x, r).square().sum().backward()
        assert torch.equal(x.grad, r.grad)
        x.grad.mul_(2)
        assert torch.equal(x.grad, 2 * r.grad)


def test_one_tensor_in_both_places():
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)
    y, s = add_layer_norm(x, x, (8,), w, w, input_bias=w, prenorm=True)
    exact = torch.nn.functional.layer_norm(2 * x + w, (8,), w, w), 2 * x + w
    grads = [torch.autograd.grad(a.sin().sum() + b.cos().sum(), (x, w)) for a, b in ((y, s), exact)]
    torch.testing.assert_close(*grads)


def test_a_stack_of_layers_trains():
    """Ten pre-norm layers: the gradient reaches the first through residual streams alone and through the norms."""
    torch.manual_seed(1)
    weights = [(torch.randn(16, 16) / 4).requires_grad_() for _ in range(10)]
    x = torch.randn(5, 16)

    def ours():
        hidden, stream = layer_norm(x, (16,)), x
        for w in weights:
            hidden, stream = add_layer_norm(hidden @ w, stream, (16,), prenorm=True)
        return hidden + stream

    def torchs():
        hidden, stream = torch.nn.functional.layer_norm(x, (16,)), x
        for w in weights:
            stream = stream + hidden @ w
            hidden = torch.nn.functional.layer_norm(stream, (16,))
        return hidden + stream

    torch.testing.assert_close(
        torch.autograd.grad(ours().sin().sum(), weights),
        torch.autograd.grad(torchs().sin().sum(), weights),
        rtol=1e-4,
        atol=1e-5,
    )


def test_lazily_negated_and_zero_tensors():
    x = torch.randn(3, 8)
    negated = torch.complex(torch.zeros(3, 8), -x).conj().imag
    assert negated.is_neg()
    assert torch.equal(layer_norm(negated, (8,)), layer_norm(x, (8,)))
    with pytest.raises(RuntimeError, match="resolve_neg"):
        layer_norm(x, (8,), out=negated)
    zero = torch._efficientzerotensor((3, 8))
    assert torch.equal(residual_add(zero, x), x)
