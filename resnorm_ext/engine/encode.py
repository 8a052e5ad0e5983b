# SPDX-License-Identifier: BSD-3-Clause
"""Inference through Transformer layers on the CPU, each function one call into csrc/engine, which other Python threads
and interrupts do not disturb. No grad; inputs are not written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..build.extension import extension

# How many rows go through the layers at once: what is written for them stays in the caches. Memory for as many is kept
# by every thread that runs layers.
MAX_ROWS = 1024


def prepare_norm(weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> extension.Norm:
    """The layer norm as layers whose residual sums are of ``dtype`` read it."""
    parameters = (None if each is None else each.detach().resolve_neg() for each in (weight, bias))
    if dtype == torch.float32:  # half-precision ones may come to be read so; float32 ones may stand beside a half
        parameters = (None if each is None else each.to(dtype) for each in parameters)
    return extension.Norm(*parameters, eps)


def encode(
    tokens: Tensor,
    cu_seqlens: Tensor,
    layers: Sequence[extension.LayerWeights],
    *,
    norm_first: bool = False,
    is_causal: bool = False,
) -> Tensor:
    """The last layer's output, ``(tokens, dim)``, for packed ``tokens`` with these sequences' bounds, through post-norm
    layers (Vaswani et al. 2017; BERT) or, with ``norm_first``, pre-norm ones (Xiong et al. 2020; ViT)."""
    return extension.encode(tokens, cu_seqlens, layers, norm_first, is_causal, MAX_ROWS)


def pre_norm_layer(x: Tensor, layer: extension.LayerWeights, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """The output of a pre-norm layer for ``x``, ``(rows, dim)``, whose attention is the caller's.

    Args:
        attend: from queries, keys and values, ``(rows, 3, num_heads, head_dim)``, which it may keep, to the context,
            ``(rows, ...)``.
    """
    return extension.pre_norm_layer(x, layer, attend, MAX_ROWS)
