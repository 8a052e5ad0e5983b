# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives as autograd, torch.func, the tracers and the compiler take them, and that their bits repeat."""

from __future__ import annotations

import itertools

import pytest
import torch
from operators.cases import ADD_LAYER_NORM, FULL_NORM_CASES, NORM_CASES, Case, require_grad
from operators.exactness import incoming_gradients
from operators.test_registration import inner_samples, operator, samples
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from resnorm_ext.functional import add_layer_norm, layer_norm, residual_add

from .device import DEVICE, results_and_gradients, seed_at, to_device

pytestmark = pytest.mark.cuda


def inputs_and_functions(case: Case, shape):
    """(tensors, operator, formula), of positional tensors in float64."""
    inputs = to_device(case.make_inputs(shape, torch.float64))

    def function(call):
        return lambda *tensors: call(dict(zip(inputs, tensors, strict=True)), seed=seed_at(inputs))

    return tuple(inputs.values()), function(case.ours), function(case.reference)


@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_gradcheck_and_gradgradcheck(case):
    tensors, ours, _ = inputs_and_functions(case, (3, 5))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert gradcheck(ours, leaves, check_batched_grad=True)
    assert gradgradcheck(ours, leaves)


@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_transforms(case):
    tensors, ours, formula = inputs_and_functions(case, (3, 6))
    every = tuple(range(len(tensors)))

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    def loss(function):
        return lambda *tensors: sum((output * output.cos()).sum() for output in function(*tensors))

    close(grad(loss(ours), every)(*tensors), grad(loss(formula), every)(*tensors))
    tangents = tuple(tensor.cos() for tensor in tensors)
    close(jvp(ours, tensors, tangents), jvp(formula, tensors, tangents))
    expected = jacrev(formula, every)(*tensors)
    close(jacrev(ours, every)(*tensors), expected)
    close(jacfwd(ours, every)(*tensors), expected)
    batch = tuple(torch.stack([tensor, -tensor, tensor.sin()]) for tensor in tensors)
    close(vmap(ours)(*batch), tuple(map(torch.stack, zip(*(formula(*sample) for sample in zip(*batch))))))
    in_dims = (0, *[None] * (len(tensors) - 1))
    close(*(vmap(grad(loss(f), every), in_dims)(batch[0], *tensors[1:]) for f in (ours, formula)))


@pytest.mark.parametrize("cols", [21, 768, 140000])
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_each_subset_of_tensors_that_require_grad(case, cols):
    inputs = to_device(case.make_inputs((6, cols)))
    grads = to_device(incoming_gradients(case, inputs))
    _, every = results_and_gradients(case, inputs, grads)
    for size in range(1, len(inputs) + 1):
        for names in itertools.combinations(inputs, size):
            leaves = require_grad(inputs, names)
            torch.autograd.backward(case.ours(leaves, seed=seed_at(inputs)), grads)
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == (name in names)
                assert leaf.grad is None or torch.equal(leaf.grad, every[name]), (name, names)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["y", "s", "y and s"])
@pytest.mark.parametrize("case", [ADD_LAYER_NORM[4], ADD_LAYER_NORM[-1]], ids=str)
def test_outputs_that_nobody_uses(case, used):
    tensors, ours, formula = inputs_and_functions(case, (4, 9))
    gradients = []
    for function in (ours, formula):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        results = function(*leaves)
        sum(results[i].square().sum() for i in used).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(40_001, 64), (4097, 768), (601, 1001), (500, 8192), (150, 20480), (40, 65536)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_bits_repeat(case, dtype, shape):
    """Whatever else the GPU does meanwhile, and wherever in memory the tensors lie."""
    inputs = to_device(case.make_inputs(shape, dtype))
    grads = to_device(incoming_gradients(case, inputs))
    results, gradients = results_and_gradients(case, inputs, grads)
    first, kept = [*results, *gradients.values()], []
    for _ in range(4):
        kept.append(torch.randn(1 << 20, device=DEVICE).sort())
        copies = {name: tensor.clone() for name, tensor in inputs.items()}
        results, gradients = results_and_gradients(case, copies, [grad.clone() for grad in grads])
        assert all(torch.equal(a, b) for a, b in zip(first, [*results, *gradients.values()], strict=True))


@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_deterministic_algorithms_may_be_asked_for(case):
    inputs = to_device(case.make_inputs((64, 768)))
    grads = to_device(incoming_gradients(case, inputs))
    expected = results_and_gradients(case, inputs, grads)
    torch.use_deterministic_algorithms(True)
    try:
        actual = results_and_gradients(case, inputs, grads)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", samples(True))
def test_opcheck_of_public_operators(name):
    pytest.importorskip("expecttest")
    arguments = [
        argument.to(DEVICE).detach().requires_grad_(argument.requires_grad)
        if isinstance(argument, torch.Tensor)
        else argument
        for argument in samples(True)[name]
    ]
    torch.library.opcheck(operator(name), tuple(arguments))


@pytest.mark.parametrize("name", inner_samples())
def test_opcheck_of_inner_operators(name):
    pytest.importorskip("expecttest")
    torch.library.opcheck(operator(name), to_device(inner_samples()[name]))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
    def test_forward_and_backward_of_any_number_of_rows(self, case):
        """By Inductor, with work around the operator, so that there is something to fuse it with."""

        def around(call):
            def function(inputs, seed):
                return tuple(output.sin() for output in call(inputs | {"input": inputs["input"] * 2}, seed=seed))

            return function

        compiled = torch.compile(around(case.ours), fullgraph=True, dynamic=True)
        for rows in (5, 7):
            inputs = to_device(case.make_inputs((rows, 768)))
            grads = to_device(incoming_gradients(case, inputs))
            leaves = require_grad(inputs)
            outcomes = []
            for function in (compiled, around(case.reference)):
                outputs = function(leaves, seed_at(inputs))
                outcomes.append([*outputs, *torch.autograd.grad(outputs, leaves.values(), grads)])
            torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)

    def test_in_place(self):
        x, stream, weight = (torch.randn(shape, device=DEVICE) for shape in ((4, 768), (4, 768), (768,)))

        def block(x, stream, y):
            before = stream.sum()
            add_layer_norm(x, stream, (768,), weight, prenorm=True, out=(y, stream))
            layer_norm(y, (768,), out=y)
            residual_add(y, stream, out=stream)
            return before, stream.sum()

        expected_stream, expected_y = stream.clone(), torch.empty_like(x)
        expected = block(x, expected_stream, expected_y)
        y = torch.empty_like(x)
        actual = torch.compile(block, fullgraph=True)(x, stream, y)
        torch.testing.assert_close((*actual, stream, y), (*expected, expected_stream, expected_y))

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_dropout_draws_anew_at_each_call(self, mode):
        """Also where the compiler captures graphs."""

        @torch.compile(fullgraph=True, mode=mode)
        def drop(x):
            return residual_add(x, torch.zeros_like(x), dropout_p=0.5, training=True)

        x = torch.ones(64, 768, device=DEVICE, requires_grad=True)
        outputs = []
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            output = drop(x)
            (gradient,) = torch.autograd.grad(output.sum(), x)
            outputs.append(output.detach().clone())
            assert torch.equal(gradient, outputs[-1])
        assert all(0.3 < (output == 0).double().mean() < 0.7 for output in outputs)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))
