# SPDX-License-Identifier: BSD-3-Clause
"""Inference through post-norm Transformer layers (Vaswani et al. 2017; BERT) on packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .. import functional
from .chunks import in_chunks
from .layers import LayerWeights, Norm


def encode(tokens: Tensor, cu_seqlens: Tensor, layers: Sequence[LayerWeights]) -> Tensor:
    """The last layer's output for packed ``tokens``, ``(tokens, dim)`` on the CPU, which is not written. No grad."""
    uses_onednn = any(layer.uses_onednn() for layer in layers)
    return in_chunks(tokens, cu_seqlens.tolist(), partial(_run_layers, layers), uses_onednn=uses_onednn)


def _run_layers(layers: Sequence[LayerWeights], x: Tensor, cu_seqlens: Tensor) -> Tensor:
    rows = len(x)
    for layer in layers:
        qkv = layer.qkv(x).view(rows, 3, layer.num_heads, -1)
        context = functional.packed_attention(qkv, cu_seqlens, scale=layer.scale)
        x = _add_and_normalize(layer.attention_output(context.view(rows, -1)), x, layer.attention_norm)
        hidden = layer.intermediate(x, layer.activation)
        x = _add_and_normalize(layer.output(hidden), x, layer.feed_forward_norm)
    return x


def _add_and_normalize(update: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """``norm(x + update)``, over ``update``, which nobody else has."""
    return functional.add_layer_norm(update, x, (x.size(-1),), norm.weight, norm.bias, norm.eps, out=update)
