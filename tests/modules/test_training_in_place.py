# SPDX-License-Identifier: BSD-3-Clause
"""``x += module(x)`` in training: it trains wherever torch.nn's module lets it, and gives its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnorm_ext.integrations import accelerate

CALLS = {
    "layer": (lambda **k: nn.TransformerEncoderLayer(32, 4, 64, 0.0, **k), lambda module, x: module(x)),
    "encoder": (
        lambda **k: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, **k), 2, nn.LayerNorm(32)),
        lambda module, x: module(x),
    ),
    "attention": (
        lambda **k: nn.TransformerEncoderLayer(32, 4, 64, 0.0, **k),
        lambda module, x: module.self_attn(x, x, x, need_weights=False)[0],
    ),
    "attention with weights": (
        lambda **k: nn.TransformerEncoderLayer(32, 4, 64, 0.0, **k),
        lambda module, x: module.self_attn(x, x, x)[0],
    ),
    "norm": (lambda **k: nn.LayerNorm(32), lambda module, x: module(x)),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("padded", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("kind", CALLS)
def test_as_torch(kind, batch_first, norm_first, padded):
    make, call = CALLS[kind]
    module = make(batch_first=batch_first, norm_first=norm_first).train()
    x, results = torch.randn(4, 9, 32), []
    padding = torch.rand(4, 9) < 0.3 if batch_first else torch.rand(9, 4) < 0.3
    linear = nn.Linear(32, 32)
    for each in (module, accelerate(copy.deepcopy(module))):
        first = copy.deepcopy(linear)
        z = first(x)
        if padded and kind in ("layer", "encoder"):
            z += each(z, src_key_padding_mask=padding)
        else:
            z += call(each, z)
        try:
            z.square().sum().backward()
        except RuntimeError as error:
            results.append(str(error)[:60])
        else:
            results.append([first.weight.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
    if isinstance(results[0], str):  # then it need not
        return
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)
