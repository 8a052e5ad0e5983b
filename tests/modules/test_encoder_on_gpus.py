# SPDX-License-Identifier: BSD-3-Clause
"""Encoders that run packed on a GPU, with the CPU in its place: PyTorch's kernels for packed attention are emulated
(tests/attention/emulation.py)."""

from __future__ import annotations

import copy

import pytest
import torch
from attention.emulation import emulated
from torch import nn

import resnorm_ext

LAYERS, DIM, LENGTHS = 2, 32, (9, 4, 1, 8)
PADDING = torch.arange(9) >= torch.tensor(LENGTHS).unsqueeze(1)
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
ONE_EACH = {"_efficient_attention_forward": LAYERS, "_efficient_attention_backward": LAYERS}


@pytest.fixture(params=[False, True], ids=["post-norm", "pre-norm"])
def pair(request) -> tuple[nn.Module, nn.Module]:
    """torch.nn's encoder, in training without dropout, and what is made of it where padding may be skipped."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 4, 64, 0.0, "gelu", batch_first=True, norm_first=request.param)
    encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(DIM), enable_nested_tensor=False)
    return encoder, resnorm_ext.accelerate(copy.deepcopy(encoder), padding="skip")


def results(module: nn.Module, x: torch.Tensor, grad: torch.Tensor, real: torch.Tensor | None, **arguments):
    """The output at real positions, and all gradients."""
    x = x.clone().requires_grad_()
    output = module(x, **arguments)
    output = output if real is None else output[real]
    return output.detach(), torch.autograd.grad(output, [x, *module.parameters()], grad)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_skipped_in_training(pair, causal):
    encoder, accelerated = pair
    mask = nn.Transformer.generate_square_subsequent_mask(9) if causal else None
    x, grad = torch.randn(4, 9, DIM), torch.randn(sum(LENGTHS), DIM)
    arguments = {
        "mask": mask,
        "src_key_padding_mask": PADDING if mask is None else torch.zeros(4, 9).masked_fill(PADDING, -torch.inf),
    }
    with emulated() as calls:
        actual = results(accelerated, x, grad, ~PADDING, **arguments)
    assert calls == ONE_EACH
    torch.testing.assert_close(actual, results(encoder, x, grad, ~PADDING, **arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_seqlen", [None, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_sequences(pair, causal, max_seqlen):
    """What each sequence gets alone."""
    encoder, accelerated = pair
    mask = nn.Transformer.generate_square_subsequent_mask(9) if causal else None
    x, grad = torch.randn(4, 9, DIM), torch.randn(sum(LENGTHS), DIM)
    with emulated() as calls:
        output, gradients = results(
            accelerated, x[~PADDING], grad, None, cu_seqlens=BOUNDS, max_seqlen=max_seqlen, is_causal=causal
        )
    assert calls == ONE_EACH
    expected, (expected_x, *others) = results(encoder, x, grad, ~PADDING, mask=mask, src_key_padding_mask=PADDING)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, (expected_x[~PADDING], *others), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_go_by_flash_attention(pair, dtype):
    accelerated = copy.deepcopy(pair[1]).to(dtype)
    x = torch.randn(4, 9, DIM).to(dtype)
    with emulated() as calls:
        output = accelerated(x, src_key_padding_mask=PADDING)[~PADDING]
        output.sum().backward()
    assert calls == {"_flash_attention_forward": LAYERS, "_flash_attention_backward": LAYERS}
    expected = pair[0](x.float(), src_key_padding_mask=PADDING)[~PADDING]
    torch.testing.assert_close(output.float(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_the_attention(pair, dtype):
    """All else is without, so from one seed both passes agree, and from two they do not. No kernel drops in float32."""
    accelerated = copy.deepcopy(pair[1]).to(dtype)
    for layer in accelerated.layers:
        layer.self_attn.dropout = 0.5
    x, grad = torch.randn(4, 9, DIM).to(dtype), torch.randn(sum(LENGTHS), DIM).to(dtype)
    runs = []
    with emulated() as calls:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(results(accelerated, x, grad, ~PADDING, src_key_padding_mask=PADDING))
    assert calls["_flash_attention_forward"] == (3 * LAYERS if dtype == torch.bfloat16 else 0)
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][0], runs[2][0])
    torch.testing.assert_close(runs[0], runs[1])
