# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's GPT-2: each block's norms and residual adds in as few passes as can be, in inference with the faster
products, and this package's attention for prompts. Their padding is not computed, unless it is at the end, where the
next token is read. Tokens that follow a cached prompt attend as transformers has them do."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

from ..engine.encode import run_pre_norm
from ..engine.packing import pack, unpack
from .fused_norm import NORMS, add, add_then_norm
from .gpt2_attention import attend, padding_of
from .layer_kind import LayerKind
from .pre_norm_layers import PreNormIntegration, weights_for_inference


class GPT2Block(modeling_gpt2.GPT2Block):
    """The block on fused operators."""

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
        if encoder_hidden_states is not None:
            return super().forward(
                hidden_states,
                past_key_values,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                use_cache,
                **kwargs,
            )
        attention, config = self.attn, self.attn.config
        arguments = {name: value for name, value in kwargs.items() if name not in _FOR_ATTENTION}
        arguments["upcasting"] = attention.reorder_and_upcast_attn and config._attn_implementation == "eager"
        weights = weights_for_inference(self, _KIND, config, hidden_states, arguments)
        if weights is not None:
            shape = hidden_states.shape[:2]
            padding = padding_of(attention, past_key_values, attention_mask, shape)
            attends = partial(attend, attention, past_key_values, attention_mask, shape, padding, kwargs)
            if padding is None:
                return run_pre_norm(hidden_states.flatten(0, 1), weights, attends).view(hidden_states.shape)
            return unpack(run_pre_norm(pack(hidden_states, padding), weights, attends), padding)
        update, _ = attention(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        normed, hidden_states = add_then_norm(update, hidden_states, self.ln_2)
        return add(self.mlp(normed), hidden_states)


_FOR_ATTENTION = ("position_ids", "cache_position", "is_causal")  # which transformers' attention functions are given
_LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_KIND = LayerKind(
    types=(modeling_gpt2.GPT2Block, GPT2Block),
    parts={
        "ln_1": NORMS,
        "attn": (modeling_gpt2.GPT2Attention,),
        "attn.attn_dropout": (nn.Dropout,),
        "attn.resid_dropout": (nn.Dropout,),
        "ln_2": NORMS,
        "mlp": (modeling_gpt2.GPT2MLP,),
        "mlp.dropout": (nn.Dropout,),
    }
    | dict.fromkeys(_LINEARS, (Conv1D,)),
    attention="attn",
    num_heads="num_heads",
    projections=_LINEARS[:1],
    attention_dropout=("attn.attn_dropout", "p"),
    attention_output="attn.c_proj",
    attention_norm="ln_1",
    intermediate="mlp.c_fc",
    activation=("mlp", "act"),
    output="mlp.c_proj",
    feed_forward_norm="ln_2",
    dropouts=("attn.resid_dropout", "mlp.dropout"),
    eager_attention=modeling_gpt2.eager_attention_forward,
    linear=Conv1D,
    is_causal=True,
)


def _exception(block: modeling_gpt2.GPT2Block) -> str | None:
    return "cross-attention" if hasattr(block, "crossattention") else None


INTEGRATION = PreNormIntegration(_KIND, GPT2Block, config_of=lambda block: block.attn.config, exception=_exception)
