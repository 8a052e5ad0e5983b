# SPDX-License-Identifier: BSD-3-Clause
"""Inference through pre-norm Transformer layers (Xiong et al. 2020; GPT-2, ViT)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import functional
from .chunks import in_chunks
from .layers import LayerWeights


def run_layer(x: Tensor, layer: LayerWeights, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """The layer's output for ``x``, ``(rows, dim)`` on the CPU, which is not written. No grad.

    Args:
        attention: from queries, keys and values, ``(rows, 3, num_heads, head_dim)``, to the context, ``(rows, ...)``.
    """
    rows, shape = len(x), (x.size(-1),)
    norm = layer.attention_norm
    normed = functional.layer_norm(x, shape, norm.weight, norm.bias, norm.eps)
    context = attention(layer.qkv(normed).view(rows, 3, layer.num_heads, -1))
    update = layer.attention_output(context.reshape(rows, -1))
    norm, out = layer.feed_forward_norm, (update, torch.empty_like(x))
    normed, x = functional.add_layer_norm(update, x, shape, norm.weight, norm.bias, norm.eps, prenorm=True, out=out)
    update = layer.output(layer.intermediate(normed, layer.activation))
    return functional.residual_add(update, x, out=update)


def encode_layer(x: Tensor, layer: LayerWeights) -> Tensor:
    """The layer's output for ``x``, ``(batch, length, dim)`` on the CPU, all of whose positions see one another."""
    batch, length, _ = x.shape
    bounds = [length * i for i in range(batch + 1)]
    output = in_chunks(x.flatten(0, 1), bounds, partial(_run_packed, layer), uses_onednn=layer.uses_onednn())
    return output.view(x.shape)


def _run_packed(layer: LayerWeights, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return run_layer(x, layer, lambda qkv: functional.packed_attention(qkv, cu_seqlens, scale=layer.scale))
