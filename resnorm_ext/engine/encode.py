# SPDX-License-Identifier: BSD-3-Clause
"""Inference through Transformer layers on the CPU, each function one call into csrc/engine, which other Python threads
and interrupts do not disturb. No grad; inputs are not written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..build.extension import extension
from ..modules.eligibility import products_under_autocast

if TYPE_CHECKING:
    from .spec import LayerOptions


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
    return extension.encode(tokens, cu_seqlens, layers, norm_first, is_causal, extension.MAX_ROWS)


def pre_norm_layer(x: Tensor, layer: extension.LayerWeights, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """The output of a pre-norm layer for ``x``, ``(rows, dim)``, whose attention is the caller's.

    Args:
        attend: from queries, keys and values, ``(rows, 3, num_heads, head_dim)``, which it may keep, to the context,
            ``(rows, ...)``.
    """
    return extension.pre_norm_layer(x, layer, attend, extension.MAX_ROWS)


def encode_padded(
    x: Tensor,
    key_mask: Tensor | None,
    parameters: list[Tensor | None],
    options: LayerOptions,
    *,
    num_layers: int,
    is_causal: bool,
    padding: str,
) -> Tensor:
    """The same by one operator, for whoever compiles or exports the call: from ``(batch, length, dim)`` to that.

    Args:
        key_mask: bool ``(batch, length)``, True where a position is seen.
        parameters: those of all layers, as ``LayerSpec.parameters`` gives them.
        options: of every layer, with one ``eps``.
        padding: whether positions that are not seen are skipped, and zeros in the result: ``"skip"``,
            ``"skip_unless_first"`` unless any sequence's first one is hidden, ``"skip_if_trailing"`` if nothing that is
            seen comes after.
    """
    return torch.ops.resnorm.encode(
        x,
        key_mask,
        parameters,
        num_layers,
        head_dim=options.head_dim,
        scale=options.scale,
        eps=options.attention_eps,
        activation=options.activation,
        norm_first=options.norm_first,
        causal=is_causal,
        padding=padding,
        product_dtype=products_under_autocast(x.dtype),
    )
