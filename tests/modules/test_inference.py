# SPDX-License-Identifier: BSD-3-Clause
"""Which encoder layers go through the engine in one call, and that they compute what torch.nn does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnorm_ext.build.extension import extension
from resnorm_ext.engine import prepared
from resnorm_ext.integrations import accelerate

DIM, HEADS, LENGTHS = 16, 2, (7, 1, 30)


def build(layers: int = 2, final_norm: bool = True, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"activation": "gelu", "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 24, **options)
    norm = nn.LayerNorm(DIM, dtype=options.get("dtype")) if final_norm else None
    encoder = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
    for parameter in encoder.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return encoder.eval()


def reference(encoder: nn.TransformerEncoder, tokens: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """torch.nn, sequence by sequence, in float64 and without its fast path."""
    encoder, outputs = copy.deepcopy(encoder).double(), []
    for x in tokens.double().split(LENGTHS):
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1) if is_causal else torch.zeros(len(x), len(x))
        outputs.append(encoder(x[None], mask=hidden if is_causal else hidden.double())[0])
    return torch.cat(outputs)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kinds of layers that the engine has been called for."""
    log, function = [], prepared.encode

    def spy(*arguments, norm_first: bool, **options):
        log.append("pre-norm" if norm_first else "post-norm")
        return function(*arguments, norm_first=norm_first, **options)

    monkeypatch.setattr(prepared, "encode", spy)
    return log


def packed(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    return torch.randn(sum(LENGTHS), DIM).to(dtype), cu_seqlens


@pytest.mark.parametrize("max_rows", [8, 1024])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"norm_first": True}, {"bias": False}, {"activation": "relu"}, {"dtype": torch.bfloat16}],
    ids=["post-norm", "pre-norm", "no bias", "relu", "bfloat16"],
)
@torch.no_grad()
def test_whole_layers(options, final_norm, is_causal, max_rows, calls, monkeypatch):
    monkeypatch.setattr(extension, "MAX_ROWS", max_rows)
    encoder = build(final_norm=final_norm, **options)
    dtype = options.get("dtype", torch.float32)
    tokens, cu_seqlens = packed(dtype)
    before = tokens.clone()
    accelerated = accelerate(copy.deepcopy(encoder))
    output = accelerated(tokens, cu_seqlens=cu_seqlens, is_causal=is_causal)
    assert calls == ["pre-norm" if options.get("norm_first") else "post-norm"]
    assert torch.equal(tokens, before) and output.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    expected = reference(encoder, tokens, is_causal)
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def training(encoder: nn.TransformerEncoder) -> None:
    encoder.layers[1].dropout1.train()


def one_layer_pre_norm(encoder: nn.TransformerEncoder) -> None:
    encoder.layers[1].norm_first = True


def its_own_activation(encoder: nn.TransformerEncoder) -> None:
    encoder.layers[0].activation = torch.nn.functional.silu


@pytest.mark.parametrize("change", [training, one_layer_pre_norm, its_own_activation])
@torch.no_grad()
def test_what_is_more_than_weights_goes_layer_by_layer(change, calls):
    encoder = accelerate(build())
    change(encoder)
    tokens, cu_seqlens = packed()
    assert encoder(tokens, cu_seqlens=cu_seqlens).shape == tokens.shape
    assert not calls


def test_with_grad(calls):
    tokens, cu_seqlens = packed()
    accelerate(build())(tokens, cu_seqlens=cu_seqlens).sum().backward()
    assert not calls


@torch.no_grad()
def test_bounds_are_checked():
    encoder = accelerate(build())
    tokens, cu_seqlens = packed()
    for bounds, max_seqlen, error, message in (
        (cu_seqlens.long(), None, RuntimeError, "cu_seqlens of dtype"),
        (cu_seqlens[None], None, RuntimeError, "cu_seqlens of shape"),
        (cu_seqlens[:-1], None, ValueError, "from 0 to the number of tokens"),
        (cu_seqlens[[0, 2, 1, 3]], None, ValueError, "to ascend"),
        (cu_seqlens, 29, ValueError, "no sequence longer than max_seqlen"),
    ):
        with pytest.raises(error, match=message):
            encoder(tokens, cu_seqlens=bounds, max_seqlen=max_seqlen)
    assert encoder(tokens, cu_seqlens=cu_seqlens, max_seqlen=30).shape == tokens.shape
