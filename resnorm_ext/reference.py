# SPDX-License-Identifier: BSD-3-Clause
"""The formulas in plain PyTorch: the oracle of every test, and the shortest description of what the kernels compute.

Each function computes in the dtype it is given (tests pass float64) and is differentiable by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_32_BITS = 0xFFFFFFFF


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(input - mean) / sqrt(variance + eps) * weight + bias`` over the trailing dimensions (Ba et al. 2016)."""
    dims = tuple(range(-len(normalized_shape), 0))
    centered = input - input.mean(dims, keepdim=True)
    output = centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        output = output * weight
    if bias is not None:
        output = output + bias
    return output


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``input / sqrt(mean of input**2 + eps) * weight`` over the trailing dimensions (Zhang and Sennrich 2019)."""
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps if eps is None else eps
    output = input * torch.rsqrt(input.square().mean(dims, keepdim=True) + eps)
    return output if weight is None else output * weight


def residual_add(
    input: Tensor,
    residual: Tensor,
    input_bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``residual + dropout(input + input_bias)``."""
    return residual + dropout(input if input_bias is None else input + input_bias, dropout_p, seed)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y, s)`` with ``s = residual + dropout(input + input_bias)`` and ``y = layer_norm(s)``."""
    total = residual_add(input, residual, input_bias, dropout_p=dropout_p, seed=seed)
    return layer_norm(total, normalized_shape, weight, bias, eps), total


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y, s)`` with ``s = residual + dropout(input + input_bias)`` and ``y = rms_norm(s)``."""
    total = residual_add(input, residual, input_bias, dropout_p=dropout_p, seed=seed)
    return rms_norm(total, normalized_shape, weight, eps), total


def bias_activation(
    input: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``dropout(activation(input + bias))``."""
    return dropout(activated(input if bias is None else input + bias, activation), dropout_p, seed)


def activated(x: Tensor, activation: str) -> Tensor:
    """The activation function's value; for gelu and its tanh form see Hendrycks and Gimpel 2016."""
    if activation == "relu":
        return x.relu()
    if activation == "gelu":
        return x * torch.erfc(-x / math.sqrt(2)) / 2
    if activation == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    raise ValueError(f"expected activation to be relu, gelu or gelu_tanh, but got {activation}")


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    scale: float | None = None,
    causal: bool = False,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``dropout(softmax(q k^T * scale)) v`` within each sequence (Vaswani et al. 2017, section 3.2), as one attention
    over all tokens of which each sees its own sequence.

    The weight of a key for token ``t`` and head ``h`` is element ``(t * heads + h) * 2**35 + key`` of what dropout
    drops, where keys are counted within the sequence.
    """
    tokens, _, heads, head_dim = qkv.shape
    cu_seqlens = cu_seqlens.to(qkv.device)
    query, key, value = qkv.permute(1, 2, 0, 3).unbind(0)
    scores = query @ key.transpose(1, 2) * (head_dim**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible_keys(cu_seqlens, tokens, causal), -torch.inf).softmax(-1)
    if dropout_threshold(dropout_p) > 0:
        positions = torch.arange(tokens, device=qkv.device)
        rows = positions.unsqueeze(1) * heads + torch.arange(heads, device=qkv.device)[:, None, None]
        keys = positions - cu_seqlens[_sequences(cu_seqlens, tokens)].unsqueeze(1)
        draws = philox_draws((rows << 32) + keys // 8, seed).gather(-1, (keys % 8).expand_as(weights).unsqueeze(-1))
        weights = torch.where(draws.squeeze(-1) >= dropout_threshold(dropout_p), weights * dropout_scale(dropout_p), 0)
    return (weights @ value).transpose(0, 1)


def visible_keys(cu_seqlens: Tensor, tokens: int, causal: bool) -> Tensor:
    """Bool ``(tokens, tokens)``: whether a token (row) sees another one: those of its sequence, or of these what is no
    later."""
    positions, sequence = torch.arange(tokens, device=cu_seqlens.device), _sequences(cu_seqlens, tokens)
    visible = sequence.unsqueeze(1) == sequence.unsqueeze(0)
    return torch.logical_and(visible, positions.unsqueeze(1) >= positions.unsqueeze(0)) if causal else visible


def _sequences(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence of each token."""
    positions = torch.arange(tokens, device=cu_seqlens.device)
    return (positions.unsqueeze(1) >= cu_seqlens.unsqueeze(0)).sum(1) - 1


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Of the contiguous tensor of ``x``'s shape; ``x`` itself where ``p`` rounds to no dropout."""
    if dropout_threshold(p) == 0:
        return x
    return torch.where(dropout_keep_mask(seed, x.shape, p), x * dropout_scale(p), 0.0)


def dropout_threshold(p: float) -> int:
    """An element is dropped where its 16-bit draw is below this."""
    return int(65536 * p + 0.5)


def dropout_scale(p: float) -> float:
    """What kept values are multiplied by, so that the expectation is exact: a float32."""
    threshold = dropout_threshold(p)
    return 1.0 if threshold == 65536 else torch.tensor(65536 / (65536 - threshold), dtype=torch.float32).item()


def dropout_keep_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Bool tensor of ``shape``: whether dropout keeps each element of the contiguous tensor of that shape.

    Element ``e`` takes half-word ``e mod 8`` (low half first) of Philox-4x32-10 at counter ``e // 8`` under the 64-bit
    key ``seed`` (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    numel = torch.Size(shape).numel()
    draws = philox_draws(torch.arange((numel + 7) // 8, dtype=torch.int64, device=seed.device), seed)
    return (draws.reshape(-1)[:numel] >= dropout_threshold(p)).reshape(shape)


def philox_draws(counter: Tensor, key: Tensor) -> Tensor:
    """The eight 16-bit draws of each counter, in a last dimension."""
    words = philox_4x32_10(counter, key)
    return torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)


def philox_4x32_10(counter: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (as int64) for each 64-bit ``counter``, upper counter words zero."""
    c0, c1 = counter & _LOW_32_BITS, (counter >> 32) & _LOW_32_BITS
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key & _LOW_32_BITS, (key >> 32) & _LOW_32_BITS
    for _ in range(10):
        product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW_32_BITS) ^ c1 ^ k0,
            product1 & _LOW_32_BITS,
            ((product0 >> 32) & _LOW_32_BITS) ^ c3 ^ k1,
            product0 & _LOW_32_BITS,
        )
        k0, k1 = (k0 + _PHILOX_KEY_INCREMENTS[0]) & _LOW_32_BITS, (k1 + _PHILOX_KEY_INCREMENTS[1]) & _LOW_32_BITS
    return c0, c1, c2, c3
