# SPDX-License-Identifier: BSD-3-Clause
"""Long packed batches in chunks of whole sequences: sequences do not see each other, and everything that is written for
a chunk stays in the caches and in memory that the process already has."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._extension import extension
from .linear import MAX_ROWS


def in_chunks(
    tokens: Tensor, bounds: list[int], run: Callable[[Tensor, Tensor], Tensor], *, uses_onednn: bool
) -> Tensor:
    """``run(tokens, cu_seqlens)``, of ``tokens``' shape, one chunk after the other.

    Args:
        tokens: ``(tokens, dim)`` on the CPU, not written.
        bounds: the sequences'; ascending from 0 to the number of tokens.
        run: may get rows of zeros as a last sequence, which make up a number that oneDNN takes as it is.
    """
    if not len(tokens):
        return torch.empty_like(tokens)
    chunks = list(_chunks(bounds, MAX_ROWS))
    if len(chunks) == 1:
        return _run_chunk(tokens, bounds, run, uses_onednn)
    output = torch.empty_like(tokens)
    for first, last in chunks:
        begin, end = bounds[first], bounds[last]
        chunk_bounds = [bound - begin for bound in bounds[first : last + 1]]
        output[begin:end] = _run_chunk(tokens[begin:end], chunk_bounds, run, uses_onednn)
    return output


def _chunks(bounds: list[int], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of sequences, each as many as fit in ``max_tokens``, or one that is longer."""
    first, count = 0, len(bounds) - 1
    while first < count:
        last = max(bisect_right(bounds, bounds[first] + max_tokens) - 1, first + 1)
        yield first, last
        first = last


def _run_chunk(x: Tensor, bounds: list[int], run: Callable[[Tensor, Tensor], Tensor], uses_onednn: bool) -> Tensor:
    tokens, dim = x.shape
    rows = extension.onednn_padded_rows(tokens) if uses_onednn else tokens
    if rows != tokens:
        padded = x.new_zeros(rows, dim)
        padded[:tokens] = x
        x, bounds = padded, [*bounds, rows]
    return run(x, torch.tensor(bounds, dtype=torch.int32, device=x.device))[:tokens]
