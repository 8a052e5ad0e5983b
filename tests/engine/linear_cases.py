# SPDX-License-Identifier: BSD-3-Clause
"""Operands of linear layers, and what they should give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnorm_ext.build.extension import extension, load_extension

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
BACKENDS = ("aten", "onednn", "resnorm")
# Around the sizes of the pieces that oneDNN's inputs are cut into.
ROWS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 2047, 2048, 2049, 5003)
IN, OUT = 24, 40


def operands(rows: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = (rows,) if isinstance(rows, int) else rows
    shapes = ((*rows, IN), (OUT, IN), (OUT,))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def reference(x, weight, bias, activation):
    """In float64."""
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def needs_onednn(dtype: torch.dtype = torch.float32) -> None:
    load_extension()
    if "onednn" not in extension.linear_backends(dtype):
        pytest.skip(f"this PyTorch or CPU has no oneDNN linear for {dtype}")
