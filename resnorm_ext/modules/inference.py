# SPDX-License-Identifier: BSD-3-Clause
"""Encoder layers in inference on the CPU, as engine/encode.py runs them: whole layers in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..build.extension import extension
from ..engine.encode import encode, prepare_norm
from ..engine.linear import product_dtype
from ..engine.packing import check_sequences
from .attention import AttentionPattern
from .eligibility import activation_name, autocast_obstacle, is_cpu_inference, products_under_autocast
from .linear import choose_backend, prepared_linear


def infer(layers: Sequence[nn.TransformerEncoderLayer], x: Tensor, pattern: AttentionPattern) -> Tensor | None:
    """The output of ``layers`` without an obstacle for packed ``x``, ``(tokens, dim)``; None where the call asks for
    more than inference on the layers' weights, or these are not all alike."""
    if pattern.cu_seqlens is None or not is_cpu_inference(x) or len({layer.norm_first for layer in layers}) != 1:
        return None
    if autocast_obstacle() is not None or not all(_can_infer(layer, x) for layer in layers):
        return None
    check_sequences(pattern.cu_seqlens, len(x), pattern.max_seqlen)
    linears = [weight for layer in layers for _, weight, _ in _linears(layer)]
    dtype = product_dtype(choose_backend(x.dtype, *linears))
    autocast_dtype = products_under_autocast(x.dtype)
    products = dtype if autocast_dtype is None else product_dtype(choose_backend(autocast_dtype, *linears))
    weights = [_weights(layer, products, dtype) for layer in layers]
    tokens = x.resolve_neg().to(dtype)
    norm_first = layers[0].norm_first
    output = encode(tokens, pattern.cu_seqlens, weights, norm_first=norm_first, is_causal=pattern.is_causal)
    return output.to(x.dtype)


def _can_infer(layer: nn.TransformerEncoderLayer, x: Tensor) -> bool:
    """Whether ``layer`` is its weights, all of ``x``'s dtype, and an activation that the engine knows."""
    attention = layer.self_attn
    dropouts = (layer.dropout, layer.dropout1, layer.dropout2)
    if (attention.training and attention.dropout > 0.0) or any(each.training and each.p > 0.0 for each in dropouts):
        return False
    tensors = [tensor for _, *pair in _linears(layer) for tensor in pair if tensor is not None]
    return (
        activation_name(layer.activation) is not None
        and all(type(tensor) is nn.Parameter and tensor.is_cpu and tensor.dtype == x.dtype for tensor in tensors)
        and x.size(-1) == attention.embed_dim
    )


def _linears(layer: nn.TransformerEncoderLayer) -> Iterator[tuple[nn.Module, Tensor, Tensor | None]]:
    """Each linear layer's module, weight and bias."""
    attention = layer.self_attn
    yield attention, attention.in_proj_weight, attention.in_proj_bias
    for linear in (attention.out_proj, layer.linear1, layer.linear2):
        yield linear, linear.weight, linear.bias


def _weights(layer: nn.TransformerEncoderLayer, products: torch.dtype, norms: torch.dtype) -> extension.LayerWeights:
    """What the engine reads of ``layer``, in these dtypes."""
    qkv, attention_output, intermediate, output = (prepared_linear(*each, products) for each in _linears(layer))
    attention = layer.self_attn
    return extension.LayerWeights(
        num_heads=attention.num_heads,
        scale=attention.head_dim**-0.5,
        qkv=qkv,
        attention_output=attention_output,
        attention_norm=prepare_norm(layer.norm1.weight, layer.norm1.bias, layer.norm1.eps, norms),
        intermediate=intermediate,
        activation=activation_name(layer.activation),
        output=output,
        feed_forward_norm=prepare_norm(layer.norm2.weight, layer.norm2.bias, layer.norm2.eps, norms),
    )
