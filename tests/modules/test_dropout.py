# SPDX-License-Identifier: BSD-3-Clause
"""Dropout in one pass, and attention with it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from resnorm_ext.modules.attention import AttentionPattern, _padded_attention
from resnorm_ext.modules.dropout import dropout


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 96), (7, 3, 5, 33), (2049,)])
def test_values_are_scaled_or_zero(shape, dtype, p):
    x = torch.rand(shape, dtype=dtype) + 1
    y = dropout(x, p)
    kept = y != 0
    assert y.dtype == dtype and y.shape == x.shape
    rounded = round(p * 2**16) / 2**16
    torch.testing.assert_close(y[kept], (x / (1 - rounded))[kept], rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert abs(1 - kept.double().mean().item() - p) < 5 * deviation


def test_elements_are_dropped_by_themselves():
    """Rates of rows, columns and neighbours in pairs, over many draws."""
    x, draws, p = torch.ones(8, 16), 4000, 0.3
    dropped = torch.stack([dropout(x, p) == 0 for _ in range(draws)]).double()
    deviation = math.sqrt(p * (1 - p) / draws)
    assert (dropped.mean(0) - p).abs().max() < 5 * deviation
    for both in (dropped[:, :, 1:] * dropped[:, :, :-1], dropped[:, 1:] * dropped[:, :-1]):
        assert (both.mean(0) - p * p).abs().max() < 5 * math.sqrt(p**2 * (1 - p**2) / draws)


def test_the_backward_pass_drops_the_same():
    x = torch.rand(33, 65).add_(1).requires_grad_()
    y = dropout(x, 0.4)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(grad, torch.where(y == 0, 0.0, 1 / (1 - round(0.4 * 2**16) / 2**16)))


def test_derivatives():
    x = torch.rand(3, 5, dtype=torch.float64).requires_grad_()

    def same_mask(x):
        torch.manual_seed(1)
        return dropout(x * x, 0.5)

    assert torch.autograd.gradcheck(same_mask, x) and torch.autograd.gradgradcheck(same_mask, x)


def test_no_mask_is_kept():
    saved = []
    x = torch.rand(64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        dropout(x, 0.1)
    assert sum(saved) < x.numel() // 8


@pytest.mark.parametrize(
    "x", [torch.ones(0, 4), torch.ones(4, 0), torch.tensor(2.0), torch.ones(3, 4, 5).transpose(0, 2)]
)
def test_shapes(x):
    assert dropout(x, 0.5).shape == x.shape
    assert not dropout(x, 1.0).any()


def test_one_seed_gives_one_mask():
    x = torch.ones(16, 16)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append((dropout(x, 0.5), dropout(x, 0.5)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(*results[0])


def test_compiled_it_is_torchs():
    compiled = torch.compile(lambda x: dropout(x, 0.25), fullgraph=True, backend="eager")
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    actual = compiled(x)
    torch.manual_seed(3)
    assert torch.equal(actual, F.dropout(x, 0.25))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_at_a_rate_of_next_to_nothing(dtype, kind, batch_first):
    """Which drops nothing: rates are multiples of 2**-16."""
    qkv = torch.randn(3, 3, 3, 2, 8, dtype=dtype, requires_grad=True)
    mask = None
    if kind == "padding":
        mask = torch.zeros(3, 1, 1, 3, dtype=dtype)
        mask[0, ..., 2] = mask[1] = -torch.inf  # a query of the second sequence sees nothing
    pattern = AttentionPattern(batch_first, mask, kind == "causal")
    outputs, grads = [], []
    for p in (1e-9, 0.0):
        output = _padded_attention(qkv, pattern, p)
        outputs.append(output)
        grads.append(torch.autograd.grad(output.square().sum(), qkv)[0])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads)


def test_attention_drops_weights():
    """Values are rows of the identity, so the context is the weights."""
    qkv = torch.zeros(4, 16, 3, 2, 16)
    qkv[:, :, 2] = torch.eye(16).unsqueeze(1)
    weights = _padded_attention(qkv, AttentionPattern(True, None, False), 0.25)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / 16 / 0.75))
    assert abs(kept.double().mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / weights.numel())
