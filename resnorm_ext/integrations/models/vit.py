# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's ViT."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.vit import modeling_vit

from ...engine.spec import Dropouts
from ..block import add, add_then_norm
from ..family import Family
from ..looped import StackLayer
from ..spec import TransformersLayer


class ViTLayer(StackLayer, modeling_vit.ViTLayer):
    def fused(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        update, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        normed, hidden_states = add_then_norm(update, hidden_states, self.layernorm_after, self.dropout)
        return add(self.mlp(normed), hidden_states, self.dropout)


ViTLayer.spec = TransformersLayer(
    types=(modeling_vit.ViTLayer, ViTLayer),
    parts={"attention": (modeling_vit.ViTAttention,), "mlp": (modeling_vit.ViTMLP,)},
    attention="attention",
    projections=("attention.q_proj.", "attention.k_proj.", "attention.v_proj."),
    attention_output="attention.o_proj.",
    attention_norm="layernorm_before",
    intermediate="mlp.fc1.",
    activation=("mlp", "activation_fn"),
    output="mlp.fc2.",
    feed_forward_norm="layernorm_after",
    dropouts=Dropouts(("attention", "attention_dropout"), ("dropout", "p"), update=("dropout", "p")),
    norm_first=True,
)

INTEGRATION = Family(ViTLayer.spec, [ViTLayer], looped=modeling_vit.ViTModel)
