# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's ViT: each layer's norms and residual adds in as few passes as can be, in inference with the faster
products and this package's attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.vit import modeling_vit
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

from ..engine.encode import encode
from ..engine.packing import equal_bounds
from .fused_norm import NORMS, add, add_then_norm
from .layer_kind import LayerKind
from .pre_norm_layers import PreNormIntegration, layer_for_inference
from .replace import Replacement, original_forward


class ViTLayer(Replacement, modeling_vit.ViTLayer):
    """The layer on fused operators."""

    chooses_path = True

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        forward = original_forward(self, ViTLayer)
        if forward is not None:
            return forward(hidden_states, attention_mask, **kwargs)
        arguments = {"attention_mask": attention_mask, **kwargs}
        prepared = layer_for_inference(self, _KIND, hidden_states, arguments)
        if prepared is not None:
            batch, length, _ = hidden_states.shape
            tokens = prepared.tokens_of(hidden_states)
            output = encode(tokens, equal_bounds(batch, length), prepared.layers, norm_first=True)
            return output.to(hidden_states.dtype).view(hidden_states.shape)
        update, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        normed, hidden_states = add_then_norm(update, hidden_states, self.layernorm_after, self.dropout)
        return add(self.mlp(normed), hidden_states, self.dropout)


_LINEARS = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
_KIND = LayerKind(
    types=(modeling_vit.ViTLayer, ViTLayer),
    parts={
        "attention": (ViTAttention,),
        "layernorm_before": NORMS,
        "layernorm_after": NORMS,
        "mlp": (ViTMLP,),
        "dropout": (nn.Dropout,),
    }
    | dict.fromkeys(_LINEARS, (nn.Linear,)),
    attention="attention",
    head_dim="head_dim",
    projections=_LINEARS[:3],
    attention_dropout=("attention", "attention_dropout"),
    attention_output="attention.o_proj",
    attention_norm="layernorm_before",
    intermediate="mlp.fc1",
    activation=("mlp", "activation_fn"),
    output="mlp.fc2",
    feed_forward_norm="layernorm_after",
    dropouts=("dropout",),
    eager_attention=modeling_vit.eager_attention_forward,
)

INTEGRATION = PreNormIntegration(_KIND, ViTLayer)
