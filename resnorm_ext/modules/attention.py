# SPDX-License-Identifier: BSD-3-Clause
"""Multi-head self-attention with the parameters and masks of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting

from .. import cuda_attention, functional
from ..engine.packing import equal_bounds, pack, packing_of_sequences, unpack
from ..recording import is_exported
from .dropout import dropout
from .eligibility import has_plain_tensors, is_eager
from .linear import linear
from .masks import batch_and_length, causal_mask, check_masks, merge_masks
from .originals import COMMON, Originals, forwards
from .tracing import asks_for_original, for_torchscript, run_original

ORIGINALS = COMMON + forwards(nn.MultiheadAttention) + Originals((F, "multi_head_attention_forward"))


class AttentionPattern(NamedTuple):
    """Which positions of a batch see one another.

    Attributes:
        batch_first: whether a padded batch is ``(batch, length, dim)`` or ``(length, batch, dim)``.
        mask: additive, broadcastable to ``(batch, heads, length, length)``.
        is_causal: no position sees a later one; no ``mask`` then.
        cu_seqlens: the batch is packed, ``(tokens, dim)``, and these are its sequences' bounds; no ``mask`` then.
        max_seqlen: of a packed batch, where known.
    """

    batch_first: bool = True
    mask: Tensor | None = None
    is_causal: bool = False
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


class SelfAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` where query, key and value are one tensor, on scaled_dot_product_attention.

    Constructor, initialisation, parameters and results are torch.nn's, with these differences: ``key`` and ``value``
    may be left out, ``is_causal=True`` needs no ``attn_mask``, and a query whose keys are all hidden attends to nothing
    (its output is the output projection's bias, its attention weights are zeros) where torch.nn may give NaN.

    What is not self-attention of equal dimensions (another key or value, ``kdim``, ``vdim``, ``add_bias_kv``,
    ``add_zero_attn``, nested tensors) is computed by torch.nn.

    Shape: query ``(batch, length, embed_dim)``, ``(length, batch, embed_dim)`` without ``batch_first``, or unbatched
    ``(length, embed_dim)``; ``key_padding_mask`` ``(batch, length)``; ``attn_mask`` ``(length, length)`` or
    ``(batch * num_heads, length, length)``. Bool masks hide where True, float masks are added to the scores.

    Raises AssertionError or RuntimeError, as torch.nn does, for masks of wrong shape or dtype.
    """

    _torch_forward = for_torchscript(nn.MultiheadAttention.forward)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        key = query if key is None else key
        value = key if value is None else value
        if is_scripting():
            if is_causal and attn_mask is None:
                attn_mask = causal_mask(batch_and_length(query, self.batch_first)[1], query)
            return self._torch_forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if not isinstance(self, SelfAttention):
            return nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        asks = asks_for_original(query) or is_exported() or ORIGINALS.reason() is not None
        if asks or query is not key or key is not value or not self._is_supported():
            if is_causal and attn_mask is None and isinstance(query, Tensor):  # which torch.nn asks for
                attn_mask = causal_mask(batch_and_length(query, self.batch_first)[1], query)
            return run_original(
                nn.MultiheadAttention,
                self,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        check_masks(query, attn_mask, key_padding_mask, self.num_heads, self.batch_first)
        batch_first = self.batch_first or query.dim() == 2
        x = query.unsqueeze(0) if query.dim() == 2 else kept_for_backward(query, self.batch_first)
        batch, length = batch_and_length(x, batch_first)
        mask, is_causal = merge_masks(
            attn_mask, key_padding_mask, is_causal, batch=batch, length=length, num_heads=self.num_heads, like=x
        )
        pattern = AttentionPattern(batch_first, mask, is_causal)
        if need_weights:
            output, weights = self_attention_with_weights(self, x, pattern)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            output, weights = self_attention(self, x, pattern), None
        if query.dim() == 2:
            output, weights = output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def _is_supported(self) -> bool:
        return is_self_attention(self) and has_plain_tensors(
            (self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias)
        )


def is_self_attention(attention: nn.MultiheadAttention) -> bool:
    """Whether ``attention`` is configured for what ``self_attention`` computes."""
    return (
        attention._qkv_same_embed_dim
        and attention.bias_k is None
        and attention.bias_v is None
        and not attention.add_zero_attn
    )


def kept_for_backward(x: Tensor, batch_first: bool) -> Tensor:
    """What the projection of a caller's ``x`` may keep for the backward pass. torch.nn's keeps a copy of ``x``, length
    first, where it is batch first, so that ``x += attention(x)`` trains; this keeps one too."""
    return x.clone() if batch_first and torch.is_grad_enabled() and is_eager(x) else x


def self_attention(attention: nn.MultiheadAttention, x: Tensor, pattern: AttentionPattern) -> Tensor:
    """The output, of ``x``'s shape, of ``attention``'s parameters and dropout over the positions of ``x``."""
    qkv = _project_in(attention, x)
    dropout_p = attention.dropout if attention.training else 0.0
    attend = _padded_attention if pattern.cu_seqlens is None else _packed_attention
    context = attend(qkv, pattern, dropout_p)
    return _project_out(attention, context)


def self_attention_with_weights(
    attention: nn.MultiheadAttention, x: Tensor, pattern: AttentionPattern
) -> tuple[Tensor, Tensor]:
    """``self_attention`` of a padded batch, and the attention weights, ``(batch, heads, length, length)``."""
    query, key, value = _heads_first(_project_in(attention, x), pattern.batch_first)
    weights = _attention_weights(query, key, pattern)
    if attention.training and attention.dropout > 0.0:
        weights = dropout(weights, attention.dropout)
    return _project_out(attention, _tokens_first(weights @ value, pattern.batch_first)), weights


def _project_in(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """``(*, 3, heads, head_dim)``: queries, keys and values of ``x``, ``(*, embed_dim)``."""
    if x.size(-1) != attention.embed_dim:
        raise AssertionError(f"expected an input of embedding dimension {attention.embed_dim}, but got {x.size(-1)}")
    qkv = linear(attention, x, attention.in_proj_weight, attention.in_proj_bias)
    return qkv.unflatten(-1, (3, attention.num_heads, attention.head_dim))


def _project_out(attention: nn.MultiheadAttention, context: Tensor) -> Tensor:
    """``(*, embed_dim)`` of a context ``(*, heads, head_dim)``."""
    return linear(attention.out_proj, context.flatten(-2), attention.out_proj.weight, attention.out_proj.bias)


def _heads_first(qkv: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each ``(batch, heads, length, head_dim)``: views."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0) if batch_first else qkv.permute(2, 1, 3, 0, 4).unbind(0)


def _tokens_first(context: Tensor, batch_first: bool) -> Tensor:
    """``(batch, length, heads, head_dim)``, or length first: a view."""
    return context.transpose(1, 2) if batch_first else context.permute(2, 0, 1, 3)


def _attention_weights(query: Tensor, key: Tensor, pattern: AttentionPattern) -> Tensor:
    """``(batch, heads, length, length)``; zeros for a query whose keys are all hidden."""
    scores = (query * query.size(-1) ** -0.5) @ key.transpose(-2, -1)
    if pattern.mask is not None:
        scores = scores + pattern.mask
        hidden = (scores == -torch.inf).all(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(hidden, 0.0), -1).masked_fill(hidden, 0.0)
    if pattern.is_causal:
        later = scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.softmax(scores, -1)


def has_attention_kernel(x: Tensor) -> bool:
    """Whether this package's kernels compute attention without a mask, dropout and gradients included, of ``x``."""
    return is_eager(x) and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0


def _packed_attention(qkv: Tensor, pattern: AttentionPattern, dropout_p: float) -> Tensor:
    cu_seqlens, max_seqlen = pattern.cu_seqlens, pattern.max_seqlen
    if cuda_attention.has_kernel(qkv, cu_seqlens, max_seqlen, dropout_p=dropout_p):
        query, key, value = qkv.unbind(1)
        return cuda_attention.attend(
            query, key, value, cu_seqlens, max_seqlen, causal=pattern.is_causal, dropout_p=dropout_p
        )
    if dropout_p > 0.0 and not qkv.is_cpu:
        return _packed_through_padded_attention(qkv, pattern, dropout_p)
    return functional.packed_attention(
        qkv,
        pattern.cu_seqlens,
        max_seqlen=pattern.max_seqlen,
        causal=pattern.is_causal,
        dropout_p=dropout_p,
        training=True,
    )


def _padded_attention(qkv: Tensor, pattern: AttentionPattern, dropout_p: float) -> Tensor:
    if pattern.mask is None and pattern.batch_first and has_attention_kernel(qkv):
        batch, length = qkv.shape[:2]
        packed = AttentionPattern(is_causal=pattern.is_causal, cu_seqlens=equal_bounds(batch, length))
        return _packed_attention(qkv.flatten(0, 1), packed, dropout_p).unflatten(0, (batch, length))
    query, key, value = _heads_first(qkv, pattern.batch_first)
    # With dropout scaled_dot_product_attention computes on a CPU just what is computed here, but for its dropout, and
    # products of half types in float32.
    if dropout_p > 0.0 and is_eager(qkv) and qkv.is_cpu and qkv.dtype in (torch.float32, torch.float64):
        context = dropout(_attention_weights(query, key, pattern), dropout_p) @ value
    else:
        context = F.scaled_dot_product_attention(query, key, value, pattern.mask, dropout_p, pattern.is_causal)
    return _tokens_first(context, pattern.batch_first)


def _packed_through_padded_attention(qkv: Tensor, pattern: AttentionPattern, dropout_p: float) -> Tensor:
    """Where nothing else has a fast kernel for attention with dropout."""
    packing = packing_of_sequences(pattern.cu_seqlens.to(qkv.device), qkv.size(0), pattern.max_seqlen)
    padded = unpack(qkv, packing)
    mask, is_causal = merge_masks(
        None,
        packing.padding(),
        pattern.is_causal,
        batch=packing.batch_size,
        length=packing.length,
        num_heads=qkv.size(-2),
        like=qkv,
    )
    return pack(_padded_attention(padded, AttentionPattern(True, mask, is_causal), dropout_p), packing)
