# SPDX-License-Identifier: BSD-3-Clause
"""Accelerated models that were made in inference mode, whose parameters count no changes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from resnorm_ext.integrations import accelerate

from .conftest import tiny_config

SIZES = {"vocab_size": 100, "initializer_range": 0.3}
CONFIGS = {
    "BERT": tiny_config(),
    "RoBERTa": transformers.RobertaConfig(**tiny_config(pad_token_id=0).to_dict()),
    "DistilBERT": transformers.DistilBertConfig(**SIZES, dim=32, hidden_dim=64, n_heads=4, n_layers=2),
    "GPT-2": transformers.GPT2Config(**SIZES, n_embd=32, n_head=4, n_layer=2, n_positions=40),
    "ViT": transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=24,
        patch_size=8,
        initializer_range=0.3,
    ),
}


def build(kind: str) -> nn.Module:
    if kind == "nn.TransformerEncoder":
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return transformers.AutoModel.from_config(CONFIGS[kind]).eval()


def input_of(kind: str) -> torch.Tensor:
    if kind == "nn.TransformerEncoder":
        return torch.randn(3, 9, 32)
    return torch.randn(3, 3, 24, 24) if kind == "ViT" else torch.randint(1, 100, (3, 9))


@pytest.fixture(params=[*CONFIGS, "nn.TransformerEncoder"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def pair(kind) -> tuple[nn.Module, nn.Module]:
    with torch.inference_mode():
        model = build(kind)
        twin = copy.deepcopy(model)
    assert all(parameter.is_inference() for parameter in twin.parameters())
    return model, accelerate(twin)


def assert_same(pair, x) -> None:
    expected, actual = (output if isinstance(output, torch.Tensor) else output[0] for output in (m(x) for m in pair))
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_of_any_value_is_seen(kind, pair, mode, caplog):
    caplog.set_level("DEBUG", logger="resnorm_ext")
    x = input_of(kind)
    with mode():
        assert_same(pair, x)
    for parameters in zip(*(each.parameters() for each in pair), strict=True):
        with torch.inference_mode():
            for parameter in parameters:
                parameter.view(-1)[parameter.numel() * 3 // 7] += 1.0
        with mode():
            assert_same(pair, x)
    assert "original, because" not in caplog.text
