# SPDX-License-Identifier: BSD-3-Clause
"""The same values in other strides, with NaN in the memory between and around them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "offset", "row strided", "uneven rows", "transposed", "last dimension strided", "expanded")
WRITABLE_LAYOUTS = LAYOUTS[:-1]


def empty(
    shape: torch.Size, dtype: torch.dtype, layout: str, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """(view, buffer): a view of ``shape`` and the memory, full of NaN, that it shows a part of."""

    def buffer(*sizes: int) -> Tensor:
        return torch.full(sizes, math.nan, dtype=dtype, device=device)

    if layout == "contiguous" or not shape:
        memory = buffer(*shape)
        return memory, memory
    *leading, last = shape
    if layout == "offset":  # by one element, so that no vector is aligned
        memory = buffer(shape.numel() + 2)
        return memory[1:-1].view(shape), memory
    if layout == "row strided":
        memory = buffer(*leading, last + 5)
        return memory[..., 2 : 2 + last], memory
    if layout == "uneven rows":  # no single distance between rows
        memory = buffer(*(size + 1 for size in leading), last)
        return memory[tuple(slice(1, None) for _ in leading)], memory
    if layout == "transposed":
        memory = buffer(*reversed(shape))
        return memory.permute(*reversed(range(len(shape)))), memory
    if layout == "last dimension strided":
        memory = buffer(*leading, 2 * last)
        return memory[..., ::2], memory
    if layout == "expanded":  # every row is the same memory, or every element of a vector
        memory = buffer(last if leading else 1)
        return memory.expand(shape), memory
    raise AssertionError(layout)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """``tensor``'s values in ``layout``; an expanded tensor repeats the first row."""
    view, memory = empty(tensor.shape, tensor.dtype, layout, tensor.device)
    if layout == "expanded":
        memory.copy_(tensor.reshape(-1, *memory.shape)[0] if tensor.numel() else torch.zeros(()))
    else:
        view.copy_(tensor)
    return view
