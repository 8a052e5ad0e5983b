# SPDX-License-Identifier: BSD-3-Clause
"""A whole training step of packed sequences under torch.compile: one graph for batches of any packing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from resnorm_ext.modules import TransformerEncoder, TransformerEncoderLayer

DIM = 32
BATCHES = ([3, 9, 1], [14, 2], [5, 5, 5, 8])


def build(norm_first: bool, dropout: float = 0.0) -> TransformerEncoder:
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(DIM, 4, 48, dropout, "gelu", batch_first=True, norm_first=norm_first)
    return TransformerEncoder(layer, 2)


def batch(lengths: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randn(sum(lengths), DIM, generator=generator, requires_grad=True)
    return tokens, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def loss_and_gradients(step, encoder: TransformerEncoder, lengths: list[int], causal: bool) -> list[Tensor]:
    tokens, cu_seqlens = batch(lengths)
    loss = step(tokens, cu_seqlens, causal)
    return [loss, *torch.autograd.grad(loss, [tokens, *encoder.parameters()])]


@pytest.mark.parametrize(
    ("norm_first", "causal", "backend"),
    [(False, False, "aot_eager"), (True, True, "aot_eager"), (True, False, "inductor")],
)
def test_one_graph_for_every_packing(norm_first, causal, backend):
    encoder = build(norm_first)

    def step(tokens, cu_seqlens, causal):
        return encoder(tokens, cu_seqlens=cu_seqlens, is_causal=causal).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for index, lengths in enumerate(BATCHES):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            ours = loss_and_gradients(compiled, encoder, lengths, causal)
        for actual, expected in zip(ours, loss_and_gradients(step, encoder, lengths, causal)):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_dropout_in_a_compiled_step():
    encoder = build(False, dropout=0.5)
    still = copy.deepcopy(encoder).eval()

    def step(tokens, cu_seqlens, causal):
        return encoder(tokens, cu_seqlens=cu_seqlens, is_causal=causal).sum(0)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    tokens, cu_seqlens = batch(BATCHES[0])
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(compiled(tokens, cu_seqlens, False))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], still(tokens, cu_seqlens=cu_seqlens).sum(0))
