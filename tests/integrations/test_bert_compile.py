# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile and torch.export of an accelerated BERT: no graph break, and nothing depends on a mask's values."""

from __future__ import annotations

import pytest
import torch

from .conftest import assert_same_at_real_positions, inputs


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_two_masks_through_one_compiled_graph(pair, grad, implementation):
    model, accelerated = pair
    for each in pair:
        each.set_attn_implementation(implementation)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(accelerated, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(grad):
        for mask in ("right", "holes", "left"):
            batch = inputs(mask)
            output = compiled(**batch).last_hidden_state
            assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch)
    (graph,) = graphs
    assert any("resnorm" in target and "add_layer_norm" in target for target in graph)


@pytest.mark.parametrize("grad", [False, True])
def test_inductor(pair, grad):
    model, accelerated = pair
    batch = inputs("right")
    real = batch["attention_mask"].bool()
    compiled = torch.compile(accelerated, fullgraph=True)
    with torch.set_grad_enabled(grad):
        output, expected = compiled(**batch).last_hidden_state, model(**batch).last_hidden_state
        assert_same_at_real_positions(output, expected, batch)
        if grad:
            for result in (output, expected):
                result[real].square().sum().backward()
            for ours, theirs in zip(accelerated.parameters(), model.parameters(), strict=True):
                if theirs.grad is not None:
                    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_eager_calls_after_compiling_are_packed(pair, path_of):
    batch = inputs("right")
    with torch.no_grad():
        torch.compile(pair[1], fullgraph=True, backend="eager")(**batch)
        assert path_of(pair[1], **batch) == "packed"


@pytest.mark.parametrize("strict", [False, True])
def test_export(pair, strict):
    model, accelerated = pair
    batch = inputs("right")
    with torch.no_grad():
        exported = torch.export.export(accelerated, (), batch, strict=strict)
        assert any("resnorm" in str(node.target) for node in exported.graph.nodes)
        for mask in ("right", "holes"):
            batch = inputs(mask)
            output = exported.module()(**batch).last_hidden_state
            assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch)
