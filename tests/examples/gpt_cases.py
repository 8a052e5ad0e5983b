# SPDX-License-Identifier: BSD-3-Clause
"""Small models of gpt.py, and what is put to them."""

from __future__ import annotations

import math
import re

import byte_data
import torch
import torch.nn.functional as F
from gpt import GPT
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT = 24
SIZES = {"context": CONTEXT, "layers": 2, "heads": 4, "width": 32}
SHAPES = [(1, 1, 8, [5]), (2, 4, 32, [CONTEXT, 1, 7]), (3, 2, 48, [CONTEXT] * 3)]  # layers, heads, width, lengths


def model_of(rms: bool = False, dropout: float = 0.0, **sizes: int) -> GPT:
    """With parameters far from those at which it begins, biases and norms among them."""
    torch.manual_seed(0)
    model = GPT(256, **(SIZES | sizes), dropout=dropout, rms=rms)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def packed(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random ids and labels of sequences one after another, and their bounds."""
    torch.manual_seed(1)
    ids, labels = torch.randint(256, (2, sum(lengths)))
    labels[1::5] = byte_data.IGNORED
    return ids, labels, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def gpt2_names(model: GPT) -> dict[str, str]:
    """transformers' name of each parameter. What it calls Conv1D has its weight transposed."""
    parts = {
        "norm1": "ln_1",
        "self_attn.in_proj": "attn.c_attn",
        "self_attn.out_proj": "attn.c_proj",
        "norm2": "ln_2",
        "linear1": "mlp.c_fc",
        "linear2": "mlp.c_proj",
    }
    outer = {"tokens": "wte", "positions": "wpe", "layers.norm": "ln_f"}
    names = {}
    for name, _ in model.named_parameters():
        part, kind = re.fullmatch(r"(.+)[._](weight|bias)", name).groups()
        if layer := re.fullmatch(r"layers\.layers\.(\d+)\.(.+)", part):
            names[name] = f"h.{layer[1]}.{parts[layer[2]]}.{kind}"
        else:
            names[name] = f"{outer[part]}.{kind}"
    return names


def is_transposed(name: str) -> bool:
    return ".c_" in name and name.endswith("weight")


def to_gpt2(model: GPT, dropout: float = 0.0) -> GPT2LMHeadModel:
    encoder = model.layers
    config = GPT2Config(
        vocab_size=256,
        n_positions=model.context,
        n_embd=encoder.norm.normalized_shape[0],
        n_layer=encoder.num_layers,
        n_head=encoder.layers[0].self_attn.num_heads,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    gpt2, names = GPT2LMHeadModel(config), gpt2_names(model)
    state = {
        names[name]: parameter.detach().t() if is_transposed(names[name]) else parameter.detach()
        for name, parameter in model.named_parameters()
    }
    assert not gpt2.transformer.load_state_dict(state).missing_keys
    gpt2.tie_weights()
    return gpt2


def plain_rms(model: GPT, ids: Tensor, dropout: float = 0.0) -> Tensor:
    """The hidden states of one sequence by torch's functions alone."""
    drop = nn.Dropout(dropout)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    x = drop(model.tokens.weight[ids] + model.positions.weight[: len(ids)])
    weight = model.layers.norm.weight
    for layer in model.layers.layers:
        query, key, value = (
            part.unflatten(-1, (layer.heads, -1)).transpose(0, 1)
            for part in F.linear(norm(x, weight), layer.in_proj.weight, layer.in_proj.bias).chunk(3, -1)
        )
        hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(1, 2) / math.sqrt(query.size(-1))).masked_fill(hidden, -torch.inf)
        context = (drop(torch.softmax(scores, -1)) @ value).transpose(0, 1).flatten(1)
        x = x + drop(F.linear(context, layer.out_proj.weight, layer.out_proj.bias))
        first, second = layer.feed_forward.linear1, layer.feed_forward.linear2
        update = F.linear(norm(x, layer.attention_norm.weight), first.weight, first.bias)
        x = x + drop(F.linear(F.gelu(update, approximate="tanh"), second.weight, second.bias))
        weight = layer.feed_forward_norm.weight
    return norm(x, weight)
