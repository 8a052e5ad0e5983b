# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile and torch.export: one graph, the same results, nothing decided while tracing that belongs to a call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnorm_ext import reference
from resnorm_ext.functional import add_layer_norm, layer_norm, residual_add

from .cases import FULL_CASES, SEED, Case, require_grad


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random_like(outputs) -> list[torch.Tensor]:
    return [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)) for o in outputs]


def step(case: Case, function, inputs) -> list[torch.Tensor]:
    """Results and gradients."""
    leaves = require_grad(inputs)
    outputs = function(leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves.values(), random_like(outputs))]


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_forward_and_backward_in_one_graph_of_any_number_of_rows(case):
    """By Inductor, with work around the operator, so that there is something to fuse it with."""

    def around(call):
        def function(inputs, seed):
            scaled = inputs | {"input": inputs["input"] * 2}
            return tuple(output.sin() for output in call(scaled, seed=seed))

        return function

    compiled = torch.compile(around(case.ours), fullgraph=True, dynamic=True)
    for rows, seed in ((5, SEED), (7, SEED + 1)):
        inputs = case.make_inputs((rows, 33))
        with torch._dynamo.config.patch(error_on_recompile=rows == 7):
            actual = step(case, lambda leaves: compiled(leaves, seed), inputs)  # noqa: B023
        expected = step(case, lambda leaves: around(case.reference)(leaves, seed), inputs)  # noqa: B023
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_operator_itself_is_in_the_graph():
    """Not torch's operators in its place."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, w = torch.randn(2, 8), torch.randn(8)

    @torch.compile(fullgraph=True, backend=backend)
    def block(x):
        y, s = add_layer_norm(x, layer_norm(x, (8,), w), (8,), w, prenorm=True)
        return residual_add(y, s)

    block(x)
    for name in ("layer_norm", "add_layer_norm", "residual_add"):
        assert f"resnorm.{name}" in seen or f"resnorm.{name}.default" in seen, seen


def test_dropout_draws_anew_at_each_call_of_compiled_code():
    """A seed that the trace had fixed would drop the same elements for ever."""

    @torch.compile(fullgraph=True)
    def drop(x):
        return residual_add(x, torch.zeros_like(x), dropout_p=0.5, training=True)

    x = torch.ones(8, 64, requires_grad=True)
    first, second = drop(x), drop(x)
    assert not torch.equal(first, second)
    for output in (first, second):
        (gradient,) = torch.autograd.grad(output.sum(), x)
        assert torch.equal(gradient, output)
        assert 0.3 < (output == 0).double().mean() < 0.7
    torch.manual_seed(5)
    again = drop(x)
    torch.manual_seed(5)
    assert torch.equal(drop(x), again)


def test_a_given_seeds_mask_is_the_same_compiled():
    x, keep = torch.ones(8, 64), reference.dropout_keep_mask(SEED, (8, 64), 0.3)

    @torch.compile(fullgraph=True)
    def drop(x, seed):
        return residual_add(x, torch.zeros_like(x), dropout_p=0.3, training=True, seed=seed)

    assert torch.equal(drop(x, SEED) != 0, keep)


def test_in_place_and_out():
    """The stream is updated in place between other operations on it, which must see it before and after."""
    x, stream, w = torch.randn(4, 33), torch.randn(4, 33), torch.randn(33)

    def block(x, stream, y):
        before = stream.sum()
        add_layer_norm(x, stream, (33,), w, prenorm=True, out=(y, stream))
        layer_norm(y, (33,), out=y)
        residual_add(y, stream, out=stream)
        return before, stream.sum()

    expected_stream, expected_y = stream.clone(), torch.empty_like(x)
    expected = block(x, expected_stream, expected_y)
    y = torch.empty_like(x)
    actual = torch.compile(block, fullgraph=True)(x, stream, y)
    torch.testing.assert_close((*actual, stream, y), (*expected, expected_stream, expected_y))


def test_a_training_step_with_half_precision_data_and_a_float32_stream():
    case = Case("add_layer_norm", ("weight", "bias", "input_bias"), 0.3, prenorm=True)
    inputs = case.make_inputs((5, 33), torch.bfloat16, residual=torch.float32, parameters=torch.float32)

    def run(call):
        leaves = require_grad(inputs)
        outputs = call(leaves)
        grads = torch.autograd.grad(sum(o.float().square().sum() for o in outputs), leaves.values())
        return [*outputs, *grads]

    for actual, expected in zip(run(torch.compile(case.ours, fullgraph=True)), run(case.ours), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)


def test_torch_func_inside_compiled_code():
    x, w = torch.randn(5, 33), torch.randn(33)

    def loss(w, x):
        return layer_norm(x, (33,), w).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = torch.func.vmap(
        torch.func.grad(lambda w, x: torch.nn.functional.layer_norm(x, (33,), w).square().sum()), in_dims=(None, 0)
    )(w, x)
    torch.testing.assert_close(torch.compile(per_sample, fullgraph=True)(w, x), expected)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_export(case):
    class Module(torch.nn.Module):
        def forward(self, inputs, seed):
            return case.ours(inputs, seed=seed)

    rows = torch.export.Dim("rows", min=2, max=100)
    inputs = case.make_inputs((6, 33))
    dynamic = {name: {0: rows} if tensor.dim() == 2 else None for name, tensor in inputs.items()}
    program = torch.export.export(Module(), (inputs, SEED), dynamic_shapes=(dynamic, None), strict=True)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"resnorm.{case.operator}.default" in targets
    for count in (6, 9):
        inputs = case.make_inputs((count, 33))
        for actual, expected in zip(program.module()(inputs, SEED), case.ours(inputs), strict=True):
            assert torch.equal(actual, expected)


def test_compiled_code_may_be_a_process_first_use_of_the_extension():
    program = """
import torch
from resnorm_ext.functional import layer_norm
compiled = torch.compile(lambda x: layer_norm(x, (8,)), fullgraph=True, backend="aot_eager")
x = torch.randn(2, 8)
torch.testing.assert_close(compiled(x), torch.nn.functional.layer_norm(x, (8,)))
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
