# SPDX-License-Identifier: BSD-3-Clause
"""torch.func and forward-mode derivatives, against the same transform of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from resnorm_ext import reference
from resnorm_ext.functional import layer_norm, residual_add

from .cases import CASES, FULL_CASES, SEED, Case, Inputs, require_grad

N = 6


def pair(case: Case, names: tuple[str, ...], **options):
    """(operator, formula) as functions of positional tensors."""

    def function(call):
        return lambda *tensors: call(dict(zip(names, tensors, strict=True)), **options)

    return function(case.ours), function(case.reference)


def loss_of(function):
    return lambda *tensors: sum((output * output.cos()).sum() for output in function(*tensors))


def double_inputs(case: Case, rows: int = 3) -> Inputs:
    return case.make_inputs((rows, N), torch.float64)


def assert_close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grad_and_vjp(case):
    inputs = double_inputs(case)
    ours, formula = pair(case, tuple(inputs))
    tensors, every = tuple(inputs.values()), tuple(range(len(inputs)))
    assert_close(grad(loss_of(ours), every)(*tensors), grad(loss_of(formula), every)(*tensors))
    results = []
    for function in (ours, formula):
        outputs, pull_back = vjp(function, *tensors)
        results.append(pull_back(tuple(output.sin() for output in outputs)))
    assert_close(*results)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jvp_and_jacobians(case):
    inputs = double_inputs(case)
    ours, formula = pair(case, tuple(inputs))
    tensors, every = tuple(inputs.values()), tuple(range(len(inputs)))
    tangents = tuple(tensor.cos() for tensor in tensors)
    assert_close(jvp(ours, tensors, tangents), jvp(formula, tensors, tangents))
    expected = jacrev(formula, every)(*tensors)
    assert_close(jacrev(ours, every)(*tensors), expected)
    assert_close(jacfwd(ours, every)(*tensors), expected)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_hessian(case):
    inputs = double_inputs(case, rows=2)
    ours, formula = (loss_of(function) for function in pair(case, tuple(inputs)))
    tensors, every = tuple(inputs.values()), tuple(range(len(inputs)))
    assert_close(hessian(ours, every)(*tensors), hessian(formula, every)(*tensors))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_over_every_tensor_in_any_dimension(case, in_dim):
    """Dropout under one seed: every sample sees the mask of its own shape, as with randomness='same'."""
    samples = [case.make_inputs((3, N), torch.float64, seed=seed) for seed in range(4)]
    expected = [torch.stack(outputs) for outputs in zip(*map(case.reference, samples))]
    batched = [torch.stack([sample[name] for sample in samples], in_dim) for name in samples[0]]
    ours, _ = pair(case, tuple(samples[0]))
    assert_close(vmap(ours, in_dims=in_dim)(*batched), tuple(expected))


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_vmap_over_one_tensor_alone(case):
    inputs = double_inputs(case)
    ours, formula = pair(case, tuple(inputs))
    for name in inputs:
        batched = inputs | {name: torch.stack([inputs[name] * scale for scale in (1.0, -2.0, 0.5)])}
        in_dims = tuple(0 if other == name else None for other in inputs)
        expected = vmap(formula, in_dims)(*batched.values())
        assert_close(vmap(ours, in_dims)(*batched.values()), expected)


def test_vmap_in_vmap():
    input, weight = torch.randn(2, 3, 5, N, dtype=torch.float64), torch.randn(3, N, dtype=torch.float64)

    def nested(function):
        return vmap(vmap(lambda x, w: function(x, (N,), w)), in_dims=(0, None))(input, weight)

    assert_close(nested(layer_norm), nested(reference.layer_norm))


def test_vmap_over_seeds_gives_each_sample_its_own_mask():
    seeds = torch.arange(5) * 12345
    ones, zeros = torch.ones(7, N), torch.zeros(7, N)
    batched = vmap(lambda seed: residual_add(ones, zeros, dropout_p=0.5, training=True, seed=seed))(seeds)
    for sample, seed in zip(batched, seeds, strict=True):
        assert torch.equal(sample != 0, reference.dropout_keep_mask(seed, (7, N), 0.5))


def test_vmap_of_dropout_without_a_seed_asks_for_randomness_as_torch_does():
    input = torch.ones(4, 8, 64)

    def dropped(x: Tensor) -> Tensor:
        return residual_add(x, torch.zeros_like(x), dropout_p=0.5, training=True)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(dropped)(input)
    same = vmap(dropped, randomness="same")(input)
    assert all(torch.equal(same[0], sample) for sample in same)
    different = vmap(dropped, randomness="different")(input)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_per_sample_gradients(case):
    samples = [double_inputs(case)]
    inputs = samples[0] | {"input": torch.randn(4, 3, N, dtype=torch.float64)}
    ours, formula = (loss_of(function) for function in pair(case, tuple(inputs)))
    every = tuple(range(len(inputs)))
    in_dims = tuple(0 if name == "input" else None for name in inputs)
    per_sample = vmap(grad(ours, every), in_dims)(*inputs.values())
    for i, sample in enumerate(inputs["input"]):
        expected = grad(formula, every)(sample, *tuple(inputs.values())[1:])
        assert_close(tuple(gradient[i] for gradient in per_sample), expected)


def test_per_sample_gradients_of_a_module_with_half_precision_data():
    """functional_call over a module's parameters in float32, the data in bfloat16."""

    class Norm(torch.nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    module, data = Norm(N), torch.randn(4, 3, N).bfloat16()
    parameters = dict(module.named_parameters())

    def loss(parameters, sample):
        return functional_call(module, parameters, (sample,)).float().square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, data)
    for i, sample in enumerate(data):
        for name, gradient in grad(loss)(parameters, sample).items():
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(per_sample[name][i], gradient, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dual_numbers(case):
    inputs = double_inputs(case)
    results = []
    for call in (case.ours, case.reference):
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(t, t.cos()) for n, t in inputs.items()}
            results.append([forward_ad.unpack_dual(output).tangent for output in call(duals)])
    assert_close(*results)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_forward_over_reverse(case):
    """A Hessian-vector product: the gradient's own forward derivative."""
    inputs = double_inputs(case)
    results = []
    for call in (case.ours, case.reference):
        with forward_ad.dual_level():
            leaves = require_grad(inputs)
            duals = {n: forward_ad.make_dual(t, t.detach().cos()) for n, t in leaves.items()}
            loss = sum(output.sin().sum() for output in call(duals))
            gradients = torch.autograd.grad(loss, duals.values(), create_graph=True)
            results.append([forward_ad.unpack_dual(gradient).tangent for gradient in gradients])
    assert_close(*results)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_batched_gradients(case):
    leaves = require_grad(double_inputs(case))
    results = []
    for call in (case.ours, case.reference):
        outputs = call(leaves)
        batches = [torch.stack([o.detach() * scale for scale in (1.0, 2.0, -3.0)]).sin() for o in outputs]
        results.append(torch.autograd.grad(outputs, leaves.values(), batches, is_grads_batched=True))
    assert_close(*results)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_penalty_on_a_gradient(case):
    """Double backward as people use it: float32, through create_graph, to parameters."""
    inputs = case.make_inputs((5, 33))
    results = []
    for call, cast in ((case.ours, torch.float32), (case.reference, torch.float64)):
        leaves = require_grad({name: tensor.to(cast) for name, tensor in inputs.items()})
        loss = sum(output.sin().sum() for output in call(leaves, seed=SEED))
        (gradient,) = torch.autograd.grad(loss, leaves["input"], create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), leaves.values(), allow_unused=True)
        results.append([None if g is None else g.double() for g in second])
    for actual, expected in zip(*results, strict=True):
        if expected is None or actual is None:
            assert (actual is None or not actual.any()) and (expected is None or not expected.any())
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
