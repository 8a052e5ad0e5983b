# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's ViT: each layer's norms and residual adds in as few passes as can be, in inference with the faster
products and this package's attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.vit import modeling_vit
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

from ..engine.encode import encode_pre_norm
from ..engine.packing import equal_bounds
from .fused_norm import NORMS, add, add_then_norm
from .layer_kind import LayerKind
from .pre_norm_layers import PreNormIntegration, weights_for_inference


class ViTLayer(modeling_vit.ViTLayer):
    """The layer on fused operators."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        arguments = {"attention_mask": attention_mask, **kwargs}
        weights = weights_for_inference(self, _KIND, self.attention.config, hidden_states, arguments)
        if weights is not None:
            batch, length, _ = hidden_states.shape
            output = encode_pre_norm(hidden_states.flatten(0, 1), equal_bounds(batch, length), weights)
            return output.view(hidden_states.shape)
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
    num_heads="num_attention_heads",
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

INTEGRATION = PreNormIntegration(_KIND, ViTLayer, config_of=lambda layer: layer.attention.config)
