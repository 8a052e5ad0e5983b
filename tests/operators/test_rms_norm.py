# SPDX-License-Identifier: BSD-3-Clause
"""rms_norm and add_rms_norm beside torch's rms_norm: what the tables of cases do not ask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnorm_ext.functional import add_rms_norm, rms_norm

from .cases import DTYPES, accumulation, eps_of
from .exactness import Roundings


@pytest.mark.parametrize("eps", [None, 1e-3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps(dtype, eps):
    """On rows so small that eps is all there is: by default that of the type in which torch computes."""
    x = (torch.randn(5, 40, dtype=torch.float64) * 1e-4).to(dtype)
    expected = F.rms_norm(x.double(), (40,), eps=eps_of(accumulation(dtype)) if eps is None else eps)
    for result in (rms_norm(x, (40,), eps=eps), F.rms_norm(x, (40,), eps=eps)):
        torch.testing.assert_close(result.double(), expected, rtol=Roundings.NORMALIZED * eps_of(dtype), atol=0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_default_eps_of_a_sum(dtypes):
    x, r = (torch.full((2, 64), 1e-9, dtype=dtype) for dtype in dtypes)
    y = add_rms_norm(x, r, (64,))
    rtol = Roundings.NORMALIZED * eps_of(dtypes[0])
    torch.testing.assert_close(y.double(), F.rms_norm(x + r, (64,)).double(), rtol=rtol, atol=0)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)], ids=str)
def test_any_normalized_shape(shape):
    x, weight = torch.randn(2, 3, 8), torch.randn(shape)
    torch.testing.assert_close(rms_norm(x, shape, weight), F.rms_norm(x, shape, weight))
    y, s = add_rms_norm(x, x, shape, weight, prenorm=True)
    torch.testing.assert_close(y, F.rms_norm(x + x, shape, weight))
    assert torch.equal(s, x + x)


def test_squares_beyond_the_range_of_float32_give_zeros_as_torchs_do():
    x, zeros = torch.full((3, 64), 3e18), torch.zeros(3, 64)
    assert torch.equal(rms_norm(x, (64,)), zeros) and torch.equal(F.rms_norm(x, (64,)), zeros)
    torch.testing.assert_close(rms_norm(x / 10, (64,)), zeros + 1)
    torch.testing.assert_close(rms_norm(x.double() * 1e100, (64,)), zeros.double() + 1)


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")])
def test_special_values_as_torchs(special):
    x = torch.randn(4, 40)
    x[1, 7] = special
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [rms_norm(leaves[0], (40,)), F.rms_norm(leaves[1], (40,))]
    torch.testing.assert_close(*outputs, equal_nan=True)
    for output in outputs:
        output.sum().backward()
    torch.testing.assert_close(leaves[0].grad[[0, 2, 3]], leaves[1].grad[[0, 2, 3]])
    assert leaves[0].grad[1].isnan().any()


def test_constant_and_zero_rows():
    torch.testing.assert_close(rms_norm(torch.full((2, 300), -7.0), (300,)), torch.full((2, 300), -1.0))
    assert torch.equal(rms_norm(torch.zeros(2, 300), (300,)), torch.zeros(2, 300))
