# SPDX-License-Identifier: BSD-3-Clause
"""More than 2^31 and 2^32 elements, in full."""

from __future__ import annotations

import pytest
import torch

from resnorm_ext import reference
from resnorm_ext.functional import add_layer_norm, layer_norm, residual_add

from .device import DEVICE

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def memory_of_its_own():
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def need(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes * 1e9:,.0f} bytes of GPU memory, and {free:,} are free")


def test_layer_norm_of_more_than_2_to_the_31_elements():
    """One block of rows many times over: every copy's results are the block's."""
    need(30)
    rows, cols = 1024, 4096
    copies = 2**31 // (rows * cols) + 2
    block, block_grad = (torch.randn(rows, cols, device=DEVICE).bfloat16() for _ in range(2))
    weight, bias = (torch.randn(cols, device=DEVICE).requires_grad_() for _ in range(2))
    x = block.requires_grad_()
    y = layer_norm(x, (cols,), weight, bias)
    expected = [y.detach(), torch.autograd.grad(y, x, block_grad)[0]]

    x = block.detach().repeat(copies, 1).requires_grad_()
    y = layer_norm(x, (cols,), weight, bias)
    grads = torch.autograd.grad(y, (x, weight, bias), block_grad.repeat(copies, 1))
    for actual, of_block in zip((y.detach(), grads[0]), expected, strict=True):
        assert (actual.view(copies, rows, cols) == of_block).all()
    normalized = reference.layer_norm(block.detach().double(), (cols,))
    sums = [(block_grad.double() * normalized).sum(0) * copies, block_grad.double().sum(0) * copies]
    for actual, exact in zip(grads[1:], sums, strict=True):
        assert (actual.double() - exact).abs().max() < 1e-4 * exact.abs().max()


def keep_from(seed: torch.Tensor, first: int, count: int, p: float) -> torch.Tensor:
    """Whether dropout keeps elements [first, first + count), for multiples of 8."""
    words = reference.philox_4x32_10(torch.arange(first // 8, (first + count) // 8, device=DEVICE), seed)
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return draws.flatten() >= reference.dropout_threshold(p)


@pytest.mark.parametrize("operator", ["residual_add", "add_layer_norm"])
def test_dropout_of_more_than_2_to_the_32_elements(operator):
    """Of ones that are one row's memory: the mask of the first rows, of the last, and of those around 2^31 and 2^32."""
    need(32)
    cols, seed, p = 32768, torch.tensor(11, device=DEVICE), 0.25
    rows = 2**32 // cols + 16
    ones = torch.ones(1, cols, device=DEVICE, dtype=torch.bfloat16).expand(rows, cols)
    zeros, input = torch.zeros_like(ones[:1]).expand(rows, cols), ones.detach().requires_grad_()
    options = {"dropout_p": p, "training": True, "seed": seed}
    if operator == "residual_add":
        s = residual_add(input, zeros, **options)
    else:
        _, s = add_layer_norm(input, zeros, (cols,), prenorm=True, **options)
    (gradient,) = torch.autograd.grad(s, input, ones)
    scale = torch.tensor(reference.dropout_scale(p), dtype=torch.bfloat16, device=DEVICE)
    for row in (0, 2**31 // cols - 2, 2**32 // cols - 2, rows - 4):
        expected = keep_from(seed, row * cols, 4 * cols, p).view(4, cols) * scale
        assert torch.equal(s[row : row + 4], expected) and torch.equal(gradient[row : row + 4], expected)
    kept = sum(int(part.count_nonzero()) for part in s.split(4096))
    assert kept / s.numel() == pytest.approx(1 - p, abs=1e-4)


def test_more_than_2_to_the_31_rows():
    need(15)
    x, bias = torch.ones(2**31 + 24, 1, device=DEVICE, dtype=torch.bfloat16), torch.full((1,), 3.0, device=DEVICE)
    y = layer_norm(x, (1,), None, bias)
    assert all((part == 3.0).all() for part in y.split(2**28))
