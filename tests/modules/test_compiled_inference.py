# SPDX-License-Identifier: BSD-3-Clause
"""Encoders that are compiled or exported without grad: all layers are one operator, which packs when it runs."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import resnorm_ext.modules as rn

DIM, HEADS, LENGTH = 16, 2, 7
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
PADDINGS = {
    "none": torch.zeros(3, LENGTH, dtype=torch.bool),
    "right": torch.arange(LENGTH) >= torch.tensor([[7], [3], [5]]),
    "left": torch.arange(LENGTH) < torch.tensor([[0], [3], [2]]),
    "holes": torch.tensor([[0, 1, 0, 0, 1, 0, 0]] * 3, dtype=torch.bool),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """And torch.nn's fast path on, as a user has it: where that skips padding, this does."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.backends.mha.set_fastpath_enabled(enabled)


def build(padding: str = "auto", *, layers: int = 2, norm: bool = True, **options) -> rn.TransformerEncoder:
    torch.manual_seed(0)
    layer = rn.TransformerEncoderLayer(DIM, HEADS, 24, **{"batch_first": True, "activation": "gelu"} | options)
    encoder = rn.TransformerEncoder(layer, layers, rn.LayerNorm(DIM) if norm else None)
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.3)
    encoder.padding = padding
    return encoder.eval()


class Graphs:
    """A backend that runs what it is given, and keeps the names in it."""

    def __init__(self) -> None:
        self.targets: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list) -> torch.fx.GraphModule:
        self.targets.append([str(node.target) for node in graph.graph.nodes if "resnorm" in str(node.target)])
        return graph


@pytest.mark.parametrize("padding", ["auto", "skip"])
@torch.no_grad()
def test_masks_of_any_content_go_through_one_graph(padding):
    encoder, graphs = build(padding), Graphs()
    compiled = torch.compile(encoder, fullgraph=True, backend=graphs)
    x = torch.randn(3, LENGTH, DIM)
    for mask in PADDINGS.values():
        torch.testing.assert_close(
            compiled(x, src_key_padding_mask=mask), encoder(x, src_key_padding_mask=mask), **TOLERANCE
        )
    assert graphs.targets == [["resnorm.encode", "resnorm.layer_norm"]]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_without_padding(causal, batch_first, norm_first):
    encoder, graphs = build(norm_first=norm_first, batch_first=batch_first, norm=False), Graphs()
    compiled = torch.compile(encoder, fullgraph=True, backend=graphs)
    x = torch.randn(3, LENGTH, DIM)
    options = {"is_causal": causal, "mask": torch.ones(LENGTH, LENGTH).triu(1).bool() if causal else None}
    if not batch_first:
        options["mask"] = None if not causal else torch.ones(3, 3).triu(1).bool()
    torch.testing.assert_close(compiled(x, **options), encoder(x, **options), **TOLERANCE)
    assert graphs.targets == [["resnorm.encode"]]


@torch.no_grad()
def test_a_layer_alone_and_an_unbatched_sequence():
    layer, graphs = build("skip").layers[0], Graphs()
    layer.padding = "skip"
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    x, mask = torch.randn(3, LENGTH, DIM), PADDINGS["right"]
    torch.testing.assert_close(compiled(x, src_key_padding_mask=mask), layer(x, src_key_padding_mask=mask), **TOLERANCE)
    torch.testing.assert_close(compiled(x[0]), layer(x[0]), **TOLERANCE)
    assert graphs.targets == [["resnorm.encode"]] * 2


def hooked(encoder: nn.Module) -> None:
    encoder.layers[1].linear1.register_forward_hook(lambda module, args, output: output * 2)


def half_pre_norm(encoder: nn.Module) -> None:
    encoder.layers[1].norm_first = True


def other_eps(encoder: nn.Module) -> None:
    encoder.layers[1].norm2.eps = 0.1


def unnamed_activation(encoder: nn.Module) -> None:
    encoder.layers[0].activation = functools.partial(nn.functional.gelu, approximate="tanh")


def computed(encoder: nn.Module) -> None:
    encoder.padding = "compute"


@pytest.mark.parametrize("change", [hooked, half_pre_norm, other_eps, unnamed_activation, computed])
@torch.no_grad()
def test_what_is_no_one_operator_is_computed_as_before(change):
    encoder, graphs = build(), Graphs()
    change(encoder)
    compiled = torch.compile(encoder, backend=graphs)
    x, mask = torch.randn(3, LENGTH, DIM), PADDINGS["right"]
    expected, output = (each(x, src_key_padding_mask=mask) for each in (encoder, compiled))
    torch.testing.assert_close(output[~mask], expected[~mask], **TOLERANCE)
    assert not any("resnorm.encode" in targets for targets in graphs.targets)


def test_with_grad_it_is_as_before():
    encoder, graphs = build(), Graphs()
    x = torch.randn(3, LENGTH, DIM, requires_grad=True)
    output = torch.compile(encoder, fullgraph=True, backend=graphs)(x)
    torch.testing.assert_close(output, encoder(x), **TOLERANCE)
    output.sum().backward()
    assert x.grad is not None and not any("resnorm.encode" in targets for targets in graphs.targets)


@torch.no_grad()
def test_changed_weights_take_effect():
    encoder = build()
    compiled = torch.compile(encoder, fullgraph=True)
    x = torch.randn(3, LENGTH, DIM)
    torch.testing.assert_close(compiled(x), encoder(x), **TOLERANCE)
    for change in (
        lambda: encoder.layers[0].linear1.weight.mul_(2.0),
        lambda: encoder.layers[0].self_attn.in_proj_weight[:3].zero_(),
        lambda: encoder.layers[1].linear2.weight.data.clamp_(-0.1, 0.1),
        lambda: encoder.load_state_dict({name: 0.9 * value for name, value in encoder.state_dict().items()}),
    ):
        before = compiled(x)
        change()
        torch.testing.assert_close(compiled(x), copy.deepcopy(encoder)(x), **TOLERANCE)
        assert not torch.equal(compiled(x), before)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export(strict):
    encoder = build()
    x, mask = torch.randn(3, LENGTH, DIM), PADDINGS["right"]
    program = torch.export.export(encoder, (x,), {"src_key_padding_mask": mask}, strict=strict)
    assert [str(node.target) for node in program.graph.nodes].count("resnorm.encode.default") == 1
    for mask in PADDINGS.values():
        torch.testing.assert_close(
            program.module()(x, src_key_padding_mask=mask), encoder(x, src_key_padding_mask=mask), **TOLERANCE
        )
