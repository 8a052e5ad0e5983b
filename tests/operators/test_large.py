# SPDX-License-Identifier: BSD-3-Clause
"""Offsets and sizes beyond 32 bits, without the memory to hold them."""

from __future__ import annotations

import pytest
import torch

from resnorm_ext import reference
from resnorm_ext.build.extension import ensure_loaded
from resnorm_ext.functional import add_layer_norm, layer_norm

FAR = 2**31 + 3  # elements between rows
ROWS, COLS = 3, 40


@pytest.fixture
def far_rows(tmp_path):
    """Makes tensors of a few rows in a sparse file, each row gigabytes behind the one before."""

    def make(name: str, values: torch.Tensor) -> torch.Tensor:
        elements = (ROWS - 1) * FAR + COLS
        memory = torch.from_file(str(tmp_path / name), shared=True, size=elements, dtype=values.dtype)
        return memory.as_strided((ROWS, COLS), (FAR, 1)).copy_(values)

    return make


def test_rows_far_apart(far_rows):
    values, residual, grad = (torch.randn(ROWS, COLS).bfloat16() for _ in range(3))
    near = values.clone().requires_grad_()
    far = far_rows("input", values).requires_grad_()
    for x in (near, far):
        layer_norm(x, (COLS,)).backward(grad if x is near else far_rows("grad", grad))
    assert torch.equal(far.grad, near.grad)

    expected = add_layer_norm(values, residual, (COLS,), prenorm=True)
    y, s = far_rows("y", values), far_rows("s", residual)
    with torch.no_grad():
        add_layer_norm(far, s, (COLS,), prenorm=True, out=(y, s))
    assert torch.equal(y, expected[0]) and torch.equal(s, expected[1])


def test_dropout_of_more_than_2_to_the_32_elements():
    """The last rows' mask, from the difference of two column sums, which are exact at p = 1/2 in float64."""
    ensure_loaded()
    cols, seed = 32768, torch.tensor(11)
    rows = 2**32 // cols + 16
    one_row = torch.ones(1, cols, dtype=torch.float64)
    bias = torch.empty(cols, dtype=torch.float64)

    def column_sums(rows: int) -> torch.Tensor:
        grad = one_row.expand(rows, cols)
        backward = torch.ops.resnorm._residual_add_backward
        return backward(grad, bias, 0.5, seed, torch.float64, [False, True])[1]

    first_block = (rows - 8) * cols // 8
    words = reference.philox_4x32_10(torch.arange(first_block, first_block + cols), seed)
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    keep = draws.reshape(8, cols) >= 32768
    assert torch.equal(column_sums(rows) - column_sums(rows - 8), 2.0 * keep.sum(0))
