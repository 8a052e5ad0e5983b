# SPDX-License-Identifier: BSD-3-Clause
"""First and second derivatives, what is saved for them, and that they repeat bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from resnorm_ext.functional import add_layer_norm, residual_add

from .cases import CASES, DTYPES, FULL_CASES, HALVES, Case, Inputs, require_grad
from .exactness import check_gradients, incoming_gradients, random_like
from .layouts import LAYOUTS, lay_out


def as_function(case: Case, names: tuple[str, ...], **options):
    """The operator as a function of its tensors, all positional."""
    return lambda *tensors: case.ours(dict(zip(names, tensors, strict=True)), **options)


def gradients(case: Case, inputs: Inputs, grads: list[Tensor] | None = None, **options) -> dict[str, Tensor]:
    leaves = require_grad(inputs)
    outputs = case.ours(leaves, **options)
    return dict(zip(leaves, torch.autograd.grad(outputs, leaves.values(), grads or random_like(outputs)), strict=True))


def check(case: Case, inputs: Inputs) -> None:
    grads = incoming_gradients(case, inputs)
    check_gradients(case, inputs, gradients(case, inputs, grads), grads)


@pytest.mark.parametrize("normalized_dims", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck_and_gradgradcheck(case, normalized_dims):
    inputs = require_grad(case.make_inputs((2, 3, 5), torch.float64, normalized_dims=normalized_dims))
    function = as_function(case, tuple(inputs), normalized_dims=normalized_dims)
    assert gradcheck(function, tuple(inputs.values()), check_batched_grad=True)
    assert gradgradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_that_will_be_differentiated_are_the_same(case):
    """They come from another formula, which gradgradcheck, that always asks for it, cannot hold to the kernels'."""
    leaves = require_grad(case.make_inputs((4, 19), torch.float64))
    outputs = case.ours(leaves)
    grads = random_like(outputs)
    once = torch.autograd.grad(outputs, leaves.values(), grads, retain_graph=True)
    twice = torch.autograd.grad(outputs, leaves.values(), grads, create_graph=True)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.smoke
@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    check(case, case.make_inputs((5, 7, 133), dtype))


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_parameters_and_residual_stream_beside_half_precision(case, dtype):
    inputs = case.make_inputs((33, 70), dtype, residual=torch.float32, parameters=torch.float32)
    check(case, inputs)


@pytest.mark.every_isa
@given(
    case=st.sampled_from(CASES),
    rows=st.integers(0, 9) | st.sampled_from([63, 64, 65, 131, 300]),
    cols=st.integers(8, 70) | st.sampled_from([128, 255, 511]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=5, max_size=5),
)
def test_any_size_strides_and_residual_dtype(case, rows, cols, dtypes, layouts):
    inputs = case.make_inputs((rows, cols), dtypes[0], residual=dtypes[1])
    check(case, {n: lay_out(t, layout) for (n, t), layout in zip(inputs.items(), layouts, strict=False)})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_incoming_gradients_of_any_strides(case, layout):
    inputs = case.make_inputs((4, 5, 19))
    grads = [lay_out(grad, layout) for grad in random_like(case.ours(inputs))]
    expected = gradients(case, inputs, [grad.contiguous() for grad in grads])
    for name, grad in gradients(case, inputs, grads).items():
        assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_each_subset_of_tensors_that_require_grad(case):
    inputs = case.make_inputs((6, 21))
    every = gradients(case, inputs)
    for size in range(1, len(inputs) + 1):
        for names in itertools.combinations(inputs, size):
            leaves = require_grad(inputs, names)
            outputs = case.ours(leaves)
            torch.autograd.backward(outputs, random_like(outputs))
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == (name in names)
                assert leaf.grad is None or torch.equal(leaf.grad, every[name]), (name, names)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("used", ["y", "s", "y and s", "y times s"])
def test_outputs_that_nobody_uses(used, dropout_p):
    case = Case("add_layer_norm", ("weight", "bias", "input_bias"), dropout_p, prenorm=True)
    choose = {
        "y": lambda y, s: y,
        "s": lambda y, s: s,
        "y and s": lambda y, s: torch.cat([y, s]),
        "y times s": lambda y, s: y * s,
    }[used]
    inputs = case.make_inputs((4, 9), torch.float64)
    leaves, exact = require_grad(inputs), require_grad(inputs)
    choose(*case.ours(leaves)).square().sum().backward()
    choose(*case.reference(exact)).square().sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, exact[name].grad)


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_an_unused_norm_does_not_spoil_the_sum(eps):
    """Its derivative is infinite at an Inf and in a constant row, and a gradient of zero times that is NaN."""
    x, r = torch.zeros(2, 8, requires_grad=True), torch.zeros(2, 8)
    r[0, 3] = torch.inf
    _, s = add_layer_norm(x, r.requires_grad_(), (8,), eps=eps, prenorm=True)
    for gradient in torch.autograd.grad(s.sum(), (x, r)):
        assert torch.equal(gradient, torch.ones(2, 8))


def test_residual_add_hands_its_gradient_on():
    x, r = torch.randn(2, 3, 4, requires_grad=True).unbind()
    grad = torch.randn(3, 4)
    for gradient in torch.autograd.grad(residual_add(x, r), (x, r), grad):
        assert gradient.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_backward_twice_over_a_retained_graph(case):
    leaves = require_grad(case.make_inputs((6, 21)))
    outputs = case.ours(leaves)
    grads = random_like(outputs)
    first, second = (torch.autograd.grad(outputs, leaves.values(), grads, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.autograd.grad(outputs, leaves.values(), grads)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, leaves.values(), grads)


@pytest.mark.every_isa
@pytest.mark.parametrize("case", FULL_CASES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4)], ids=str)
def test_no_rows_or_no_columns(case, shape):
    inputs = case.make_inputs(shape)
    for name, grad in gradients(case, inputs).items():
        assert torch.equal(grad, torch.zeros_like(inputs[name]))


@pytest.mark.every_isa
@pytest.mark.parametrize("case", FULL_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_repeat_for_any_number_of_threads(case, dtype):
    threads = torch.get_num_threads()
    inputs = case.make_inputs((3001, 131), dtype)
    try:
        results = []
        for count in (1, 2, 3, 4, 4, 1):
            torch.set_num_threads(count)
            results.append([*case.ours(inputs), *gradients(case, inputs).values()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_results_are_the_same_with_and_without_grad(case):
    for dtype in DTYPES:
        inputs = case.make_inputs((7, 45), dtype)
        with_grad = case.ours(require_grad(inputs))
        with torch.no_grad():
            without = case.ours(require_grad(inputs))
        assert all(o.requires_grad for o in with_grad) and not any(o.requires_grad for o in without)
        assert all(torch.equal(a, b) for a, b in zip(with_grad, without, strict=True))


@pytest.mark.parametrize(
    ("case", "saved", "free"),
    [
        (FULL_CASES[0], ["input", "weight"], []),
        (FULL_CASES[1], [], ["input", "residual"]),
        (FULL_CASES[2], ["weight"], ["input", "residual"]),
        (FULL_CASES[-1], ["input", "bias"], []),
    ],
    ids=str,
)
def test_changing_a_saved_tensor_in_place_is_detected_and_changing_the_stream_is_allowed(case, saved, free):
    for name in [*saved, *free]:
        inputs = {n: leaf.clone() for n, leaf in require_grad(case.make_inputs((4, 9))).items()}
        outputs = case.ours(inputs)
        with torch.no_grad():
            inputs[name].add_(1)
        if name in saved:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.backward(outputs, random_like(outputs))
        else:
            torch.autograd.backward(outputs, random_like(outputs))


def test_changing_the_returned_sum_in_place_is_detected():
    case = FULL_CASES[2]
    y, s = case.ours(require_grad(case.make_inputs((4, 9))))
    s.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
