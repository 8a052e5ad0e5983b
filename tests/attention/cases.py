# SPDX-License-Identifier: BSD-3-Clause
"""Packed batches, and what attention makes of them by the formula and by torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTHS = {
    "one": (7,),
    "several": (3, 1, 64, 17),
    "empty ones": (0, 5, 0, 0, 9, 0),
    "only empty ones": (0, 0),
    "none": (),
}
HEADS, HEAD_DIM = 2, 8
HALF = [torch.bfloat16, torch.float16]
KERNEL_DTYPES = [torch.float32, *HALF]


def batch(lengths: Sequence[int], dtype: torch.dtype = torch.float32, **shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads, head_dim = shape.get("heads", HEADS), shape.get("head_dim", HEAD_DIM)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    return qkv, cumulative(lengths)


def cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def by_sequence(attend: Callable[[Tensor], Tensor], qkv: Tensor, lengths: Sequence[int]) -> Tensor:
    """``attend`` takes query, key and value, ``(3, 1, heads, tokens, head_dim)``."""
    outputs = [attend(s.permute(1, 2, 0, 3).unsqueeze(1)).squeeze(0).transpose(0, 1) for s in qkv.split(list(lengths))]
    return torch.cat(outputs) if outputs else qkv.new_empty(0, *qkv.shape[2:])


def formula(qkv: Tensor, lengths: Sequence[int], scale: float | None = None, causal: bool = False) -> Tensor:
    """In float64, sequence by sequence: ``resnorm_ext.reference`` takes the square of all tokens."""

    def attend(parts: Tensor) -> Tensor:
        query, key, value = parts
        scores = query @ key.mT * (qkv.size(-1) ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        return scores.softmax(-1) @ value

    return by_sequence(attend, qkv.double(), lengths)


def sdpa(qkv: Tensor, lengths: Sequence[int], causal: bool = False) -> Tensor:
    return by_sequence(lambda parts: F.scaled_dot_product_attention(*parts, is_causal=causal), qkv, lengths)


def random_like(tensor: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def gradient(attention: Callable[[Tensor], Tensor], qkv: Tensor, grad: Tensor) -> Tensor:
    """Of ``qkv``, for the output's gradient ``grad``."""
    leaf = qkv.detach().requires_grad_()
    output = attention(leaf)
    return torch.autograd.grad(output, leaf, grad.to(output.dtype))[0]
