# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's GPT-2: each block's norms and residual adds in as few passes as can be, in inference with the faster
products, and this package's attention for prompts. Tokens that follow a cached prompt, and padded batches, attend as
transformers has them do."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

from ... import functional
from ...engine.encode import pre_norm_layer
from ...engine.packing import equal_bounds
from ...engine.spec import Dropouts
from ...modules.calls import record
from ...modules.eligibility import products_under_autocast
from ..block import add, add_then_norm, layer_for_inference
from ..family import Family
from ..replace import Replacement, original_forward
from ..spec import TransformersLayer


class GPT2Block(Replacement, modeling_gpt2.GPT2Block):
    """The block on fused operators."""

    chooses_path = True

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        forward = original_forward(self, GPT2Block)
        if forward is None and encoder_hidden_states is not None:
            forward = super().forward
        if forward is not None:
            return forward(
                hidden_states,
                past_key_values,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                use_cache,
                **kwargs,
            )
        attention = self.attn
        arguments = {name: value for name, value in kwargs.items() if name not in _FOR_ATTENTION}
        upcasts = attention.reorder_and_upcast_attn and attention.config._attn_implementation == "eager"
        prepared = None
        if _wants_grad(past_key_values, attention.layer_idx, attention_mask):
            record(self, "original", "a gradient of the cache or of the attention mask is wanted")
        elif not upcasts:
            prepared = layer_for_inference(self, _LAYER, hidden_states, arguments)
        if prepared is not None:
            dtype = products_under_autocast(hidden_states.dtype) or hidden_states.dtype
            attend = partial(_attend, attention, past_key_values, attention_mask, hidden_states.shape, dtype, kwargs)
            output = pre_norm_layer(prepared.in_stream(hidden_states.flatten(0, 1)), prepared.layers[0], attend)
            return output.to(hidden_states.dtype).view(hidden_states.shape)
        update, _ = attention(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        normed, hidden_states = add_then_norm(update, hidden_states, self.ln_2)
        return add(self.mlp(normed), hidden_states)


def _wants_grad(cache: Cache | None, layer_idx: int, mask: Tensor | None) -> bool:
    """Whether what the attention reads beside the layer's input requires grad, as in prefix tuning."""
    if not torch.is_grad_enabled():
        return False
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    kept = getattr(cache, "layers", [])[layer_idx : layer_idx + 1]
    read = [mask, *(getattr(layer, name, None) for layer in kept for name in ("keys", "values"))]
    return any(isinstance(each, Tensor) and each.requires_grad for each in read)


_FOR_ATTENTION = ("position_ids", "cache_position", "is_causal")  # which transformers' attention functions are given


def _attend(
    attention: modeling_gpt2.GPT2Attention,
    cache: Cache | None,
    mask: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    arguments: dict[str, Any],
    qkv: Tensor,
) -> Tensor:
    """The context, ``(batch * length, ...)``, of ``qkv``, ``(batch * length, 3, heads, head_dim)``.

    Keys and values are added to ``cache``, in the original's ``dtype``, and taken from it.
    """
    batch, length, _ = shape
    if cache is not None:
        qkv = qkv.to(dtype)
    query, key, value = qkv.unflatten(0, (batch, length)).permute(2, 0, 3, 1, 4)
    as_given = True  # whether key and value are those of qkv alone
    if cache is not None:
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        key, value = cache.update(key, value, attention.layer_idx)
        as_given = key.size(2) == length and _only_appends(cache, attention.layer_idx)
    if as_given and _is_causal(attention, mask, length, arguments):
        cu_seqlens = equal_bounds(batch, length)
        return functional.packed_attention(qkv, cu_seqlens, scale=attention.scaling, causal=True)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, modeling_gpt2.eager_attention_forward
    )
    context, _ = attend(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling, **arguments)
    return context.flatten(0, 1)


def _only_appends(cache: Cache, layer_idx: int) -> bool:
    """Whether ``cache`` gives back what it is given as it is, after what it holds."""
    return _has_update_of(Cache, cache) and _has_update_of(DynamicLayer, cache.layers[layer_idx])


def _has_update_of(kind: type, instance: Any) -> bool:
    return getattr(instance.update, "__func__", None) is kind.update


def _is_causal(
    attention: modeling_gpt2.GPT2Attention, mask: Tensor | None, length: int, arguments: dict[str, Any]
) -> bool:
    """Whether a position sees itself and all before it, and nothing else."""
    by_sdpa = attention.config._attn_implementation == "sdpa"
    if mask is None:  # which eager attention takes for none at all
        return by_sdpa and arguments.get("is_causal") is not False
    if mask.shape[-2:] != (length, length) or not (mask.is_floating_point() or (by_sdpa and mask.dtype == torch.bool)):
        return False
    is_bool = mask.dtype == torch.bool
    seen, hidden = (mask, ~mask) if is_bool else (mask == 0, mask <= torch.finfo(mask.dtype).min)
    past = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return bool((seen == past).all() and (hidden != past).all())


_LAYER = TransformersLayer(
    types=(modeling_gpt2.GPT2Block, GPT2Block),
    parts={"attn": (modeling_gpt2.GPT2Attention,), "mlp": (modeling_gpt2.GPT2MLP,)},
    linear=Conv1D,
    attention="attn",
    projections=("attn.c_attn.",),
    split_size="split_size",
    attention_output="attn.c_proj.",
    attention_norm="ln_1",
    intermediate="mlp.c_fc.",
    activation=("mlp", "act"),
    output="mlp.c_proj.",
    feed_forward_norm="ln_2",
    dropouts=Dropouts(("attn.attn_dropout", "p"), ("attn.resid_dropout", "p"), update=("mlp.dropout", "p")),
    norm_first=True,
    transposed=True,
    is_causal=True,
)


def _left_alone(module: nn.Module) -> str | None:
    return (
        "cross-attention" if isinstance(module, modeling_gpt2.GPT2Block) and hasattr(module, "crossattention") else None
    )


INTEGRATION = Family(_LAYER, [GPT2Block], left_alone=_left_alone)
