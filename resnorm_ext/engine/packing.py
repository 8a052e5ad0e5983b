# SPDX-License-Identifier: BSD-3-Clause
"""Padding-free batches: the real tokens of a padded batch in one row, and where each sequence begins.

A batch of B sequences padded to length S has B * S positions; position-wise work (linear layers, norms, activations)
on the padded ones is wasted. ``pack`` once before the first layer, compute on ``(tokens, ...)``, ``unpack`` once after
the last. Any mask will do: padding on the left, on the right, or in between.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor


class Packing(NamedTuple):
    """Where the tokens of a packed batch come from.

    Attributes:
        cu_seqlens: int32 ``(batch_size + 1,)``; sequence i is tokens ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``.
        indices: int64 ``(tokens,)``; each token's position in the flattened ``(batch_size * length)`` batch.
        batch_size: number of sequences, empty ones included.
        length: number of positions of a padded sequence.
        max_seqlen: number of tokens of the longest sequence.
    """

    cu_seqlens: Tensor
    indices: Tensor
    batch_size: int
    length: int
    max_seqlen: int

    def padding(self) -> Tensor:
        """Bool ``(batch_size, length)``, True at padded positions."""
        real = torch.zeros(self.batch_size * self.length, dtype=torch.bool, device=self.indices.device)
        return ~real.index_fill_(0, self.indices, True).view(self.batch_size, self.length)


def equal_bounds(batch_size: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """The ``cu_seqlens``, on ``device``, of ``batch_size`` sequences of ``length`` tokens."""
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length


def packing_of(key_mask: Tensor) -> Packing:
    """The packing that keeps the positions where ``key_mask``, bool ``(batch_size, length)``, is True.

    Raises TypeError for a mask that is not bool, ValueError for one that is not 2-D.
    """
    if key_mask.dtype != torch.bool:
        raise TypeError(f"expected key_mask to be torch.bool, but got {key_mask.dtype}")
    if key_mask.dim() != 2:
        raise ValueError(f"expected key_mask to be 2-D (batch_size, length), but got {key_mask.dim()}-D")
    batch_size, length = key_mask.shape
    seqlens = key_mask.sum(1, dtype=torch.int32)
    return Packing(
        cu_seqlens=F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0)),
        indices=key_mask.reshape(-1).nonzero().squeeze(1),
        batch_size=batch_size,
        length=length,
        max_seqlen=int(seqlens.max()) if batch_size else 0,
    )


def packing_of_sequences(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None = None) -> Packing:
    """The packing of ``tokens`` tokens that are packed already; its padded batch is left-aligned, ``max_seqlen`` long.

    Args:
        cu_seqlens: int32 ``(sequences + 1,)``, rising from 0 to ``tokens``, on the device where the tokens are.
        tokens: number of tokens.
        max_seqlen: at least the longest sequence's length; read from ``cu_seqlens`` where None.

    Raises RuntimeError or ValueError, as ``functional.packed_attention`` does, for bounds that are not of ``tokens``
    tokens; of their values nothing where the call ``is_recorded``.
    """
    longest = check_sequences(cu_seqlens, tokens, max_seqlen)
    batch_size = cu_seqlens.numel() - 1
    if max_seqlen is None:
        max_seqlen = longest if longest is not None else int(cu_seqlens.diff().max()) if batch_size else 0
    positions = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.bucketize(positions, cu_seqlens[1:], right=True)
    indices = sequence * max_seqlen + positions - cu_seqlens[sequence]
    return Packing(cu_seqlens, indices, batch_size, max_seqlen, max_seqlen)


def is_recorded(x: Tensor) -> bool:
    """Whether the values of ``x`` cannot be read now: torch.compile or a CUDA graph records the call, or there are
    none."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or x.is_meta:
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def check_sequences(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None) -> int | None:
    """The longest sequence's length; None where the call ``is_recorded``. Raises what ``packing_of_sequences`` does."""
    if cu_seqlens.dtype != torch.int32:
        raise RuntimeError(f"Expected cu_seqlens of dtype int32, but got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise RuntimeError(f"Expected cu_seqlens of shape (sequences + 1,), but got {tuple(cu_seqlens.shape)}")
    if is_recorded(cu_seqlens):
        return None
    bounds = cu_seqlens.tolist()
    if (bounds[0], bounds[-1]) != (0, tokens):
        raise ValueError(
            f"Expected cu_seqlens from 0 to the number of tokens, {tokens}, but got cu_seqlens from {bounds[0]} to "
            f"{bounds[-1]}"
        )
    longest = 0
    for begin, end in pairwise(bounds):
        if end < begin:
            raise ValueError(f"Expected cu_seqlens to ascend, but got {begin} before {end}")
        if max_seqlen is not None and end - begin > max_seqlen:
            raise ValueError(f"Expected no sequence longer than max_seqlen, {max_seqlen}, but got one of {end - begin}")
        longest = max(longest, end - begin)
    return longest


def pack(x: Tensor, packing: Packing) -> Tensor:
    """The real tokens, ``(tokens, ...)``, of a padded ``x``, ``(batch_size, length, ...)``."""
    return x.flatten(0, 1).index_select(0, packing.indices)


def unpack(tokens: Tensor, packing: Packing) -> Tensor:
    """``tokens``, ``(tokens, ...)``, at their places in ``(batch_size, length, ...)``; zeros at padded positions."""
    padded = tokens.new_zeros((packing.batch_size * packing.length, *tokens.shape[1:]))
    if tokens.requires_grad:  # index_copy_ would keep the tokens for the backward pass
        padded.index_put_((packing.indices,), tokens)
    else:
        padded.index_copy_(0, packing.indices, tokens)
    return padded.unflatten(0, (packing.batch_size, packing.length))
