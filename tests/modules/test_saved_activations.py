# SPDX-License-Identifier: BSD-3-Clause
"""What a layer keeps for its backward pass, in bytes a token: docs/training.md has the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resnorm_ext.modules import TransformerEncoderLayer

DIM, HEADS, HIDDEN = 64, 4, 256
BATCH, LENGTH = 8, 32
TOKENS = BATCH * LENGTH


def layer(kind: type[nn.Module], norm_first: bool) -> nn.Module:
    return kind(DIM, HEADS, HIDDEN, 0.1, "gelu", batch_first=True, norm_first=norm_first)


def kept(module: nn.Module, x: Tensor, **arguments: Tensor) -> int:
    """Bytes of the storages that autograd holds while the output is alive, but for parameters and arguments but x."""
    others = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *arguments.values())}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x, **arguments)
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("norm_first", [False, True])
def test_bytes_a_token(norm_first):
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    ours = kept(layer(TransformerEncoderLayer, norm_first), x)
    # Input, queries, keys, values, context, two sums, a norm's output; the first product of the feed-forward.
    matrices = 8 * DIM + HIDDEN
    # The logarithms of the softmax' sums; mean and reciprocal deviation of two norms.
    vectors = HEADS + 4
    seeds_and_bounds = 4 * 8 + 4 * (BATCH + 1)
    assert ours <= 4 * (matrices + vectors) * TOKENS + seeds_and_bounds
    assert ours <= 0.55 * kept(layer(nn.TransformerEncoderLayer, norm_first), x)


@pytest.mark.parametrize("norm_first", [False, True])
def test_padding_costs_none(norm_first):
    module = layer(TransformerEncoderLayer, norm_first)
    module.padding = "skip"
    real = torch.arange(LENGTH) < torch.tensor([LENGTH, 3, 20, 9, 1, 30, 16, 7]).unsqueeze(1)
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    padded = kept(module, x, src_key_padding_mask=~real)
    module.padding = "auto"
    full = kept(module, x)
    indices, seeds_and_bounds = 2 * 8 * int(real.sum()), 4 * 8 + 4 * (BATCH + 1)
    assert padded - indices - seeds_and_bounds <= full * real.float().mean() + seeds_and_bounds
