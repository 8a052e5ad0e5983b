# SPDX-License-Identifier: BSD-3-Clause
"""Attention of packed batches by PyTorch's own kernels, which no CPU runs: against the formula in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from attention.cases import batch, formula, gradient, random_like
from torch import Tensor, nn

from resnorm_ext import cuda_attention
from resnorm_ext.functional import packed_attention
from resnorm_ext.integrations import accelerate, report
from resnorm_ext.modules import TransformerEncoder, TransformerEncoderLayer

from .device import DEVICE

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = {"several": (33, 1, 128, 257), "empty ones": (0, 5, 0, 64, 0), "one": (300,)}
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # float32 products may be in TF32


def on_device(lengths: Sequence[int], dtype: torch.dtype, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    qkv, cu_seqlens = batch(lengths, dtype, head_dim=head_dim)
    return qkv.to(DEVICE), cu_seqlens.to(DEVICE), random_like(qkv[:, 0]).to(DEVICE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [8, 12, 64, 128, 192, 256])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, lengths, head_dim, causal):
    qkv, cu_seqlens, grad = on_device(lengths, dtype, head_dim)
    kernel = cuda_attention.kernel_of(qkv.device, dtype, head_dim)
    assert cuda_attention.has_kernel(qkv, cu_seqlens, None) == (kernel is not None)
    exact = qkv.double()
    for actual, expected in (
        (packed_attention(qkv, cu_seqlens, causal=causal), formula(qkv, lengths, causal=causal)),
        (
            gradient(lambda x: packed_attention(x, cu_seqlens, causal=causal), qkv, grad),
            gradient(lambda x: formula(x, lengths, causal=causal), exact, grad.double()),
        ),
    ):
        bound = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        assert float((actual.double() - expected).abs().max()) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_on_the_cpu_and_layouts_that_are_copied(dtype):
    qkv, cu_seqlens, _ = on_device(LENGTHS["several"], dtype, 64)
    expected = packed_attention(qkv, cu_seqlens)
    assert torch.equal(packed_attention(qkv, cu_seqlens.cpu()), expected)
    shifted = torch.empty(qkv.numel() + 1, dtype=dtype, device=DEVICE)[1:].view_as(qkv).copy_(qkv)
    torch.testing.assert_close(packed_attention(shifted, cu_seqlens), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)  # float32 goes by the formula
def test_dropout(dtype):
    """The output is linear in the values, so their gradient says whether both passes dropped the same weights."""
    qkv, cu_seqlens, grad = on_device((100, 60), dtype, 64)
    options = {"dropout_p": 0.3, "training": True}
    leaf = qkv.detach().requires_grad_()
    output = packed_attention(leaf, cu_seqlens, **options)
    (grad_qkv,) = torch.autograd.grad(output, leaf, grad)
    by_output, by_gradient = (
        float((a.double() * b.double()).sum()) for a, b in ((grad, output), (grad_qkv[:, 2], qkv[:, 2]))
    )
    assert by_gradient == pytest.approx(by_output, rel=2e-2, abs=0.5)
    mean = torch.stack([packed_attention(qkv, cu_seqlens, **options).double() for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, formula(qkv, (100, 60)), rtol=0.0, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_in_a_graph(dtype):
    """Nothing waits for the GPU where the longest sequence is known, so a captured call replays on other tokens."""
    layer = TransformerEncoderLayer(128, 4, 256, batch_first=True, device=DEVICE, dtype=dtype)
    encoder = TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    cu_seqlens = torch.tensor([0, 33, 40, 96], dtype=torch.int32, device=DEVICE)
    tokens, others = (torch.randn(96, 128, device=DEVICE).to(dtype) for _ in range(2))
    with torch.no_grad():
        expected = [encoder(each, cu_seqlens=cu_seqlens, max_seqlen=56) for each in (tokens, others)]
        graph, given = torch.cuda.CUDAGraph(), tokens.clone()
        with torch.cuda.graph(graph):
            output = encoder(given, cu_seqlens=cu_seqlens, max_seqlen=56)
        for each, reference in zip((tokens, others), expected, strict=True):
            given.copy_(each)
            graph.replay()
            torch.testing.assert_close(output, reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_text_encoder_trains_without_padding(dtype):
    """As far from float32's gradients as the original is, or nearer; and all of it packed."""
    transformers = pytest.importorskip("transformers", minversion="5.2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **rates, vocab_size=1000, initializer_range=0.1)
    model = transformers.BertForSequenceClassification(config).to(DEVICE).train()
    mask = (torch.arange(64) < torch.tensor([64, 10, 33, 1]).unsqueeze(1)).long().to(DEVICE)
    ids, labels = torch.randint(1, 1000, (4, 64), device=DEVICE), torch.tensor([0, 1, 1, 0], device=DEVICE)
    accelerated = accelerate(copy.deepcopy(model), padding="skip")

    def gradients(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = model(ids, attention_mask=mask, labels=labels).loss
        return torch.autograd.grad(loss * 64.0, list(model.parameters()))

    exact = gradients(copy.deepcopy(model).double(), torch.float32)
    theirs, ours = gradients(model, dtype), gradients(accelerated, dtype)
    (calls,) = (item.calls for item in report(accelerated).replaced if item.calls)
    assert calls == {("packed", None): 1}
    largest = max(float(each.norm()) for each in exact)
    for a, b, reference in zip(ours, theirs, exact, strict=True):
        errors = [float((each.double() - reference).norm()) for each in (a, b)]
        assert errors[0] <= 1.5 * errors[1] + 1e-5 * largest
