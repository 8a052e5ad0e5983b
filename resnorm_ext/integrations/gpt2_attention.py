# SPDX-License-Identifier: BSD-3-Clause
"""The attention of Hugging Face's GPT-2 in inference: this package's own for prompts, transformers' for tokens that
follow a cached prompt and for masks that are more than causal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2

from .. import functional
from ..engine.packing import Packing, equal_bounds, packing_of, unpack


def attend(
    attention: modeling_gpt2.GPT2Attention,
    cache: Cache | None,
    mask: Tensor | None,
    shape: tuple[int, int],
    padding: Packing | None,
    arguments: dict[str, Any],
    qkv: Tensor,
) -> Tensor:
    """The context, ``(tokens, ...)``, of ``qkv``, ``(tokens, 3, heads, head_dim)``.

    Keys and values are added to ``cache`` and taken from it.

    Args:
        shape: batch size and length.
        padding: what is left out of the batch, as ``padding_of`` has found it.
        arguments: further ones for transformers' attention functions.
    """
    padded = qkv.unflatten(0, shape) if padding is None else unpack(qkv, padding)
    query, key, value = padded.permute(2, 0, 3, 1, 4)
    as_given = True  # whether key and value are those of qkv alone
    if cache is not None:
        cache = _own_keys(cache)
        key, value = cache.update(key, value, attention.layer_idx)
        as_given = key.size(2) == shape[1] and _only_appends(cache, attention.layer_idx)
    if as_given and (padding is not None or _is_causal(attention, mask, shape[1], arguments)):
        cu_seqlens = equal_bounds(*shape) if padding is None else padding.cu_seqlens
        return functional.packed_attention(qkv, cu_seqlens, scale=attention.scaling, causal=True)
    of_transformers = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, modeling_gpt2.eager_attention_forward
    )
    context, _ = of_transformers(
        attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling, **arguments
    )
    context = context.flatten(0, 1)
    return context if padding is None else context[padding.indices]


def padding_of(
    attention: modeling_gpt2.GPT2Attention, cache: Cache | None, mask: Tensor | None, shape: tuple[int, int]
) -> Packing | None:
    """The packing of a prompt of this batch size and length whose ``mask`` is causal and hides padding.

    None where ``mask`` is not, hides nothing, or hides a last position, from which what follows is generated; and
    where ``cache`` may keep more of the padding than that it is hidden.
    """
    if mask is None or mask.shape != (shape[0], 1, shape[1], shape[1]):
        return None
    if cache is not None and not _only_appends(_own_keys(cache), attention.layer_idx):
        return None
    masks = _seen_and_hidden(attention, mask)
    if masks is None:
        return None
    seen, hidden = masks
    keys = seen[:, 0, -1]
    if keys.all() or not keys[:, -1].all():
        return None
    visible = _past(mask) & keys[:, None, None]
    return packing_of(keys) if (seen == visible).all() and (hidden != visible).all() else None


def _is_causal(
    attention: modeling_gpt2.GPT2Attention, mask: Tensor | None, length: int, arguments: dict[str, Any]
) -> bool:
    """Whether a position sees itself and all before it, and nothing else."""
    if mask is None:  # which eager attention takes for none at all
        return attention.config._attn_implementation == "sdpa" and arguments.get("is_causal") is not False
    masks = _seen_and_hidden(attention, mask)
    if mask.shape[-2:] != (length, length) or masks is None:
        return False
    seen, hidden = masks
    past = _past(mask)
    return bool((seen == past).all() and (hidden != past).all())


def _seen_and_hidden(attention: modeling_gpt2.GPT2Attention, mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where ``mask`` lets see all there is, and where nothing; None for one that the attention may take otherwise."""
    if mask.is_floating_point():
        return mask == 0, mask <= torch.finfo(mask.dtype).min
    if mask.dtype == torch.bool and attention.config._attn_implementation == "sdpa":
        return mask, ~mask
    return None


def _past(mask: Tensor) -> Tensor:
    """Bool ``(length, length)``, True where a position is not after another."""
    return torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()


def _own_keys(cache: Cache) -> Cache:
    """The part of ``cache`` that self-attention has."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _only_appends(cache: Cache, layer_idx: int) -> bool:
    """Whether ``cache`` gives back what it is given as it is, after what it holds."""
    if not _has_update_of(Cache, cache):
        return False
    if layer_idx < len(cache.layers):
        return _has_update_of(DynamicLayer, cache.layers[layer_idx])
    return cache.layer_class_to_replicate is DynamicLayer  # of which it makes one when the layer's first keys come


def _has_update_of(kind: type, instance: Any) -> bool:
    return getattr(instance.update, "__func__", None) is kind.update
