# SPDX-License-Identifier: BSD-3-Clause
"""Inference through post-norm Transformer encoder layers (Vaswani et al. 2017; BERT) on packed batches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional
from .._extension import extension
from .linear import MAX_ROWS, PreparedLinear


class Norm(NamedTuple):
    """A layer norm over the last dimension."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class PostNormLayer(NamedTuple):
    """The weights of one layer.

    Attributes:
        qkv: queries, keys and values, each ``num_heads * head_dim`` wide, side by side.
        activation: the feed-forward's, by name as in ``functional.linear``.
        scale: what attention scores are multiplied by.
    """

    num_heads: int
    scale: float
    qkv: PreparedLinear
    attention_output: PreparedLinear
    attention_norm: Norm
    intermediate: PreparedLinear
    activation: str
    output: PreparedLinear
    output_norm: Norm


def encode(tokens: Tensor, cu_seqlens: Tensor, layers: Sequence[PostNormLayer]) -> Tensor:
    """The last layer's output for packed ``tokens``, ``(tokens, dim)`` on the CPU, which is not written. No grad.

    Sequences do not see each other, so a long batch goes through all layers in chunks of whole sequences: everything a
    chunk's layers write stays in the caches and in memory that the process already has.
    """
    if not len(tokens):
        return torch.empty_like(tokens)
    bounds = cu_seqlens.tolist()
    chunks = list(_chunks(bounds, MAX_ROWS))
    if len(chunks) == 1:
        return _encode_chunk(tokens, bounds, layers)
    output = torch.empty_like(tokens)
    for first, last in chunks:
        begin, end = bounds[first], bounds[last]
        chunk_bounds = [bound - begin for bound in bounds[first : last + 1]]
        output[begin:end] = _encode_chunk(tokens[begin:end], chunk_bounds, layers)
    return output


def _chunks(bounds: list[int], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of sequences, each as many as fit in ``max_tokens``, or one that is longer."""
    first, count = 0, len(bounds) - 1
    while first < count:
        last = max(bisect_right(bounds, bounds[first] + max_tokens) - 1, first + 1)
        yield first, last
        first = last


def _encode_chunk(x: Tensor, bounds: list[int], layers: Sequence[PostNormLayer]) -> Tensor:
    tokens, dim = x.shape
    rows = extension.onednn_padded_rows(tokens) if _uses_onednn(layers) else tokens
    if rows != tokens:  # a last sequence of zeros makes up the row count that one product takes
        padded = x.new_zeros(rows, dim)
        padded[:tokens] = x
        x, bounds = padded, [*bounds, rows]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=x.device)
    for layer in layers:
        qkv = layer.qkv(x).view(rows, 3, layer.num_heads, -1)
        context = functional.packed_attention(qkv, cu_seqlens, scale=layer.scale)
        x = _add_and_normalize(layer.attention_output(context.view(rows, -1)), x, layer.attention_norm)
        hidden = layer.intermediate(x, layer.activation)
        x = _add_and_normalize(layer.output(hidden), x, layer.output_norm)
    return x[:tokens]


def _uses_onednn(layers: Sequence[PostNormLayer]) -> bool:
    return any(
        linear.uses_onednn
        for layer in layers
        for linear in (layer.qkv, layer.attention_output, layer.intermediate, layer.output)
    )


def _add_and_normalize(update: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """``norm(x + update)``, over ``update``, which nobody else has."""
    return functional.add_layer_norm(update, x, (x.size(-1),), norm.weight, norm.bias, norm.eps, out=update)
