# SPDX-License-Identifier: BSD-3-Clause
"""Accelerated models exported and compiled ahead of time, masks included, against the originals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from resnorm_ext.integrations import accelerate

MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [0] * 2 + [1] * 7])


class HiddenState(nn.Module):
    """A model as a function of tensors."""

    def __init__(self, model: nn.Module, **settings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        masks = {} if mask is None else {"attention_mask": mask}
        return self.model(x, **masks, **self.settings)[0]


def bert() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return HiddenState(transformers.BertModel(config)), (torch.randint(1, 100, (3, 9)), MASK)


def distilbert() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    config = transformers.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    return HiddenState(transformers.DistilBertModel(config)), (torch.randint(1, 100, (3, 9)), MASK)


def gpt2() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=1
    )
    return HiddenState(transformers.GPT2Model(config), use_cache=False), (torch.randint(1, 100, (3, 9)), MASK)


def vit() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=12, patch_size=4
    )
    return HiddenState(transformers.ViTModel(config)), (torch.randn(2, 3, 12, 12),)


@pytest.mark.parametrize("build", [bert, distilbert, gpt2, vit])
@torch.no_grad()
def test_exported_and_packaged(build, tmp_path: Path):
    model, arguments = build()
    accelerated = accelerate(copy.deepcopy(model.eval()))
    exported = torch.export.export(accelerated, arguments, strict=True)
    assert any("resnorm" in str(node.target) for node in exported.graph.nodes)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    other = tuple(each.flip(0) for each in arguments)
    for given in (arguments, other):
        expected = model(*given)
        real = given[1].bool() if len(given) == 2 else ...
        for run in (exported.module(), torch._inductor.aoti_load_package(package)):
            torch.testing.assert_close(run(*given)[real], expected[real], rtol=2e-5, atol=2e-5)
