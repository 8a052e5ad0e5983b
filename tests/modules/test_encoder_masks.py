# SPDX-License-Identifier: BSD-3-Clause
"""What torch.nn's encoder is known to get wrong, on its fast path or off it, and ours must not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnorm_ext.modules as rn

BATCH, LENGTH, DIM, HEADS = 3, 6, 8, 2
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}  # float64 sums of a few dozen terms near 1, in two orders


@pytest.fixture(params=["post-norm", "pre-norm"])
def encoder(request):
    layer = rn.TransformerEncoderLayer(
        DIM, HEADS, 12, activation="gelu", batch_first=True, norm_first=request.param == "pre-norm", dtype=torch.float64
    )
    encoder = rn.TransformerEncoder(layer, 2, rn.LayerNorm(DIM, dtype=torch.float64)).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    return encoder


@pytest.fixture
def src():
    return torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)


def causal_mask(dtype=torch.float64):
    return nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=dtype)


def one_by_one(encoder, src, padding, **arguments):
    """Each sequence alone, without its padding: what padding must not change. The final norm of zeros elsewhere."""
    expected = encoder.norm(torch.zeros_like(src))
    for sequence, hidden, output in zip(src, padding, expected, strict=True):
        if not hidden.all():
            output[~hidden] = encoder(sequence[~hidden].unsqueeze(0), **arguments).squeeze(0)
    return expected


@torch.no_grad()
def test_float_padding_mask_is_added_not_turned_to_bool(encoder, src):
    bias = torch.randn(BATCH, LENGTH, dtype=torch.float64)  # nothing is hidden, all is weighted
    output = encoder(src, src_key_padding_mask=bias)
    with_mask = encoder(src, bias.view(BATCH, 1, 1, LENGTH).expand(-1, HEADS, LENGTH, -1).flatten(0, 1))
    torch.testing.assert_close(output, with_mask, **TOLERANCE)
    assert not torch.allclose(output, encoder(src))


@torch.no_grad()
def test_float_attention_mask_is_added_not_turned_to_bool(encoder, src):
    bias = torch.randn(LENGTH, LENGTH, dtype=torch.float64)
    output = encoder(src, bias)
    assert not torch.allclose(output, encoder(src))
    assert not torch.allclose(output, encoder(src, bias.bool()))
    torch.testing.assert_close(encoder(src, bias + 3.0), output, **TOLERANCE)  # softmax ignores what is added to all


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@torch.no_grad()
def test_fully_padded_sequence_is_skipped_and_leaves_the_others_alone(encoder, src, kind, causal):
    encoder.padding = "skip"
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    expected = one_by_one(encoder, src, padding, is_causal=causal)
    mask = (
        padding if kind == "bool" else torch.zeros(BATCH, LENGTH, dtype=torch.float64).masked_fill(padding, -torch.inf)
    )
    torch.testing.assert_close(encoder(src, src_key_padding_mask=mask, is_causal=causal), expected, **TOLERANCE)
    everything = torch.full_like(mask, True if kind == "bool" else -torch.inf)
    output = encoder(src, src_key_padding_mask=everything, is_causal=causal)
    torch.testing.assert_close(output, encoder.norm(torch.zeros_like(src)), rtol=0, atol=0)


@torch.no_grad()
def test_fully_padded_sequence_is_finite_beside_an_arbitrary_mask(encoder, src):
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1] = True
    mask = torch.eye(LENGTH, dtype=torch.bool)
    output = encoder(src, mask, padding)
    assert output.isfinite().all()
    torch.testing.assert_close(output[[0, 2]], encoder(src[[0, 2]], mask), **TOLERANCE)


def test_fully_padded_sequence_gives_finite_gradients(encoder, src):
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1] = True
    src.requires_grad_()
    encoder(src, src_key_padding_mask=padding).sum().backward()
    assert src.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_query_whose_keys_are_all_hidden_is_finite(encoder, src, grad):
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    mask[2] = True
    with torch.set_grad_enabled(grad):
        assert encoder(src, mask).isfinite().all()


@torch.no_grad()
def test_output_keeps_its_length_when_every_sequence_ends_in_padding(encoder, src):
    encoder.padding = "skip"
    padding = torch.arange(LENGTH).expand(BATCH, -1) >= 4
    output = encoder(src, src_key_padding_mask=padding)
    assert output.shape == src.shape
    torch.testing.assert_close(output, one_by_one(encoder, src, padding), **TOLERANCE)


@torch.no_grad()
def test_padding_need_not_be_left_aligned(encoder, src):
    encoder.padding = "skip"
    padding = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    torch.testing.assert_close(
        encoder(src, src_key_padding_mask=padding), one_by_one(encoder, src, padding), **TOLERANCE
    )


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
def test_is_causal_alone_is_a_causal_mask(encoder, src, padded, grad):
    padding = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    padding = padding if padded else None
    with torch.set_grad_enabled(grad):
        for module in (encoder, encoder.layers[0]):
            expected = module(src, causal_mask(), padding, is_causal=False)
            torch.testing.assert_close(module(src, None, padding, is_causal=True), expected, **TOLERANCE)
            torch.testing.assert_close(module(src, causal_mask(), padding, is_causal=True), expected, **TOLERANCE)
            assert not torch.allclose(module(src, None, padding, is_causal=False), expected)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_causal_attention_does_not_look_ahead(encoder, src, dtype, grad):
    mask = causal_mask() if dtype == torch.float64 else causal_mask() == -torch.inf
    changed = src.clone()
    changed[:, 4:] = torch.randn_like(changed[:, 4:])
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(encoder(changed, mask)[:, :4], encoder(src, mask)[:, :4], **TOLERANCE)


@torch.no_grad()
def test_gradient_reaches_a_learned_bias_that_starts_at_zero(encoder, src):
    """A float mask of zeros hides nothing, but it is an input like any other."""
    bias = torch.zeros(BATCH, LENGTH, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        encoder(src, src_key_padding_mask=bias).square().sum().backward()
    assert bias.grad.abs().max() > 0


@torch.no_grad()
def test_gelu_by_tanh_is_not_gelu_by_erf(src):
    layer = rn.TransformerEncoderLayer(DIM, HEADS, 12, 0.0, nn.GELU("tanh"), batch_first=True, dtype=torch.float64)
    x = layer.norm1(src + layer._sa_block(src, None, None))
    expected = layer.norm2(x + layer.linear2(nn.functional.gelu(layer.linear1(x), approximate="tanh")))
    torch.testing.assert_close(layer(src), expected, **TOLERANCE)
