# SPDX-License-Identifier: BSD-3-Clause
"""The operators in torch's own functions: for tensors that know those only (nested ones, many subclasses), and for
whoever records a call and replays it where this package may be missing.

Arguments are in the order of the operators' schemas.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _layer_norm(input, normalized_shape, weight, bias, eps, input.dtype)


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor:
    return _rms_norm(input, normalized_shape, weight, eps, input.dtype)


def residual_add(
    input: Tensor,
    residual: Tensor,
    input_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    residual_dtype: torch.dtype | None,
) -> Tensor:
    total = _total(input, residual, input_bias, dropout_p, seed, residual_dtype)
    return _cast(total, _sum_dtype(input, residual, residual_dtype))


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    input_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    prenorm: bool,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``(y, s)`` whatever ``prenorm``."""
    total = _total(input, residual, input_bias, dropout_p, seed, residual_dtype)
    y = _layer_norm(total, normalized_shape, weight, bias, eps, input.dtype)
    return y, _cast(total, _sum_dtype(input, residual, residual_dtype))


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    input_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    prenorm: bool,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``(y, s)`` whatever ``prenorm``."""
    total = _total(input, residual, input_bias, dropout_p, seed, residual_dtype)
    y = _rms_norm(total, normalized_shape, weight, eps, input.dtype)
    return y, _cast(total, _sum_dtype(input, residual, residual_dtype))


def bias_activation(
    input: Tensor, bias: Tensor | None, activation: str, dropout_p: float, seed: Tensor | None
) -> Tensor:
    if activation == "none":
        raise ValueError("expected activation to be relu, gelu or gelu_tanh, but got none")
    activated = _activated(input if bias is None else input + _cast(bias, input.dtype), activation)
    return reference.dropout(activated, dropout_p, seed)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _activated(F.linear(input, weight, bias), activation)


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    hidden = reference.dropout(linear(input, weight1, bias1, activation), dropout_p, seed)
    return F.linear(hidden, weight2, bias2)


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    scale: float | None,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """One attention over all tokens: reads no value of ``cu_seqlens``, so it is recorded for other lengths too."""
    if dropout_p > 0.0 and seed is not None:
        return reference.packed_attention(qkv, cu_seqlens, scale, causal, dropout_p=dropout_p, seed=seed)
    mask = reference.visible_keys(cu_seqlens.to(qkv.device), qkv.size(0), causal)
    query, key, value = qkv.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
    context = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)
    return context.squeeze(0).transpose(0, 1)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    result_dtype: torch.dtype,
) -> Tensor:
    """Computed in the widest of the dtypes."""
    x, weight, bias = _widened(x, weight, bias)
    y = F.layer_norm(x, normalized_shape, weight, bias, eps)
    return y if x.dtype == result_dtype else y.to(result_dtype)  # autocast has a dtype of its own


def _rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    result_dtype: torch.dtype,
) -> Tensor:
    """The same."""
    x, weight = _widened(x, weight)
    y = F.rms_norm(x, normalized_shape, weight, eps)
    return y if x.dtype == result_dtype else y.to(result_dtype)


def _widened(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """All of them in the widest of their dtypes."""
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors if tensor is not None])
    return tuple(None if tensor is None else _cast(tensor, dtype) for tensor in tensors)


def _total(
    input: Tensor,
    residual: Tensor,
    input_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    residual_dtype: torch.dtype | None,
) -> Tensor:
    """``residual + dropout(input + input_bias)`` in the widest of the dtypes."""
    dtype = torch.promote_types(input.dtype, residual.dtype)
    if residual_dtype is not None:
        dtype = torch.promote_types(dtype, residual_dtype)
    update = _cast(input, dtype)
    if input_bias is not None:
        update = update + _cast(input_bias, dtype)
    return _cast(residual, dtype) + reference.dropout(update, dropout_p, seed)


def _sum_dtype(input: Tensor, residual: Tensor, residual_dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(input.dtype, residual.dtype) if residual_dtype is None else residual_dtype


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="none" if activation == "gelu" else "tanh")
    raise ValueError(f"expected activation to be relu, gelu or gelu_tanh, but got {activation}")


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which would be recorded even where it does nothing."""
    return x if x.dtype == dtype else x.to(dtype)
