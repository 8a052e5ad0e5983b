# SPDX-License-Identifier: BSD-3-Clause
"""Attention heads that are gone from the projections, while the config and the module still count all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from resnorm_ext.integrations import accelerate

from .families import FAMILIES, assert_same, output_of, taken
from .test_originals import FAST

HEAD_DIM = 8
PROJECTIONS = {  # queries, keys, values and the output projection of a layer
    "BERT": ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    "BART": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    "DistilBERT": ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    "ViT": ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
}
PROJECTIONS |= dict.fromkeys(("RoBERTa", "XLM-RoBERTa", "CamemBERT", "ELECTRA", "ERNIE"), PROJECTIONS["BERT"])


def sliced(linear: nn.Linear, kept: torch.Tensor, dim: int) -> nn.Linear:
    weight = linear.weight.detach().index_select(dim, kept)
    new = nn.Linear(weight.size(1), weight.size(0))
    new.weight = nn.Parameter(weight)
    new.bias = nn.Parameter(linear.bias.detach()[kept] if dim == 0 else linear.bias.detach().clone())
    return new


def prune(layer: nn.Module, names: tuple[str, ...], heads: tuple[int, ...]) -> None:
    kept = torch.cat([torch.arange(head * HEAD_DIM, (head + 1) * HEAD_DIM) for head in heads])
    for name in names:
        parent, _, child = name.rpartition(".")
        dim = 1 if name == names[-1] else 0
        setattr(layer.get_submodule(parent), child, sliced(layer.get_submodule(name), kept, dim))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("when", ["before", "after a call"])
@pytest.mark.parametrize("heads", [((0, 1), (2,)), ((0, 3), (0, 1, 2, 3)), ((1, 2, 3), (0, 2))], ids=str)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_what_is_left_is_what_attends(name, heads, when, grad):
    family = FAMILIES[name]
    model = family.build()
    batch, pair = family.batch(model), [model]
    if when == "before":
        pair = [model]
    else:
        pair.append(accelerate(copy.deepcopy(model)))
        output_of(pair[1], batch)
    for each in pair:
        for index, kept in enumerate(heads):
            prune(family.layer(each, index), PROJECTIONS[name], kept)
    accelerated = pair[1] if len(pair) == 2 else accelerate(copy.deepcopy(model))
    with torch.set_grad_enabled(grad):
        assert_same(output_of(accelerated, batch), output_of(model, batch))
    assert grad or taken(accelerated) <= FAST


@torch.no_grad()
def test_gpt2_in_one_projection():
    """Where its own pruning leaves the size of each part on the module, and where nothing does."""
    family = FAMILIES["GPT-2"]
    model = family.build()
    attention = family.layer(model).attn
    kept = torch.cat([part * 32 + torch.arange(16) for part in range(3)])
    for name, columns, rows in (("c_attn", kept, slice(None)), ("c_proj", slice(None), torch.arange(16))):
        old = getattr(attention, name)
        new = Conv1D(*reversed(old.weight[rows][:, columns].shape))
        new.weight, new.bias = nn.Parameter(old.weight[rows][:, columns]), nn.Parameter(old.bias[columns])
        setattr(attention, name, new)
    attention.split_size = 16
    accelerated, batch = accelerate(copy.deepcopy(model)), family.batch(model)
    assert_same(output_of(accelerated, batch), output_of(model, batch))
    assert taken(accelerated) <= FAST
    for each in (model, accelerated):
        family.layer(each).attn.split_size = 32
        with pytest.raises((RuntimeError, ValueError)):
            output_of(each, batch)


@torch.no_grad()
def test_torch_nn_refuses_what_it_refuses_itself():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    layer.self_attn.in_proj_weight = nn.Parameter(layer.self_attn.in_proj_weight[:48].clone())
    layer.self_attn.in_proj_bias = nn.Parameter(layer.self_attn.in_proj_bias[:48].clone())
    for each in (layer, accelerate(copy.deepcopy(layer))):
        with pytest.raises(RuntimeError):
            each(torch.randn(2, 5, 32))


@torch.no_grad()
def test_parts_of_heads_are_left_to_the_original():
    family = FAMILIES["BERT"]
    model = family.build()
    attention = family.layer(model).attention.self
    attention.attention_head_size = 16  # two heads of what were four
    accelerated, batch = accelerate(copy.deepcopy(model)), family.batch(model)
    assert_same(output_of(accelerated, batch), output_of(model, batch))
    for each in (model, accelerated):
        family.layer(each).attention.self.attention_head_size = 5
        with pytest.raises(RuntimeError):
            output_of(each, batch)
