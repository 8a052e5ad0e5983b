# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's DistilBERT. In inference its layers run on packed batches; else residual adds and norms are fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert

from ..engine.linear import LinearShape
from ..engine.packing import pack
from .fused_norm import NORMS, add_norm
from .layer_kind import LayerKind, linear_shapes
from .packed_layers import encode_packed, encoder_obstacle, log_obstacle, packed_batch_of_encoder
from .replace import Finding, original_class
from .transformers import attention_obstacle


class DistilBertBlock(modeling_distilbert.TransformerBlock):
    """Residual add and layer norm in one pass."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        update, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = add_norm(update, hidden_states, self.sa_layer_norm)
        return add_norm(self.ffn(hidden_states), hidden_states, self.output_layer_norm)


class DistilBertTransformer(modeling_distilbert.Transformer):
    """Runs all layers on packed tokens where nothing about the call and the layers stands against it."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, attention_mask, **kwargs)
        batch: Any = "there are no layers"
        if len(self.layer):
            config = self.layer[0].attention.config
            batch = packed_batch_of_encoder(self, _KIND, config, hidden_states, attention_mask, kwargs)
        if isinstance(batch, str):
            log_obstacle(self, batch)
            return super().forward(hidden_states, attention_mask, **kwargs)
        tokens = pack(hidden_states, batch.packing)
        return BaseModelOutput(last_hidden_state=encode_packed(self, tokens, batch))


_REPLACEMENTS = {
    modeling_distilbert.Transformer: DistilBertTransformer,
    modeling_distilbert.TransformerBlock: DistilBertBlock,
}
_LINEARS = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
_KIND = LayerKind(
    types=(modeling_distilbert.TransformerBlock, DistilBertBlock),
    parts={
        "attention": (modeling_distilbert.DistilBertSelfAttention,),
        "attention.dropout": (nn.Dropout,),
        "sa_layer_norm": NORMS,
        "ffn": (modeling_distilbert.FFN,),
        "ffn.dropout": (nn.Dropout,),
        "output_layer_norm": NORMS,
    }
    | dict.fromkeys(_LINEARS, (nn.Linear,)),
    attention="attention",
    num_heads="n_heads",
    projections=_LINEARS[:3],
    attention_dropout=("attention.dropout", "p"),
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    intermediate="ffn.lin1",
    activation=("ffn", "activation"),
    output="ffn.lin2",
    feed_forward_norm="output_layer_norm",
    dropouts=("ffn.dropout",),
    chunked=("ffn", "ff_chunk"),
    eager_attention=modeling_distilbert.eager_attention_forward,
)


class DistilBert:
    """The integration."""

    def find(self, model: nn.Module) -> Iterator[Finding]:
        for name, module in model.named_modules():
            replacement = _REPLACEMENTS.get(original_class(module))
            if replacement is not None:
                yield Finding(name, module, replacement, _lasting_obstacle(module))
            elif isinstance(module, tuple(_REPLACEMENTS)):
                yield Finding(name, module, None, "a subclass, which may compute something else")

    def hooks(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
        return iter(())

    def linear_shapes(self, model: nn.Module) -> Iterator[LinearShape]:
        return linear_shapes(model, _KIND)


def _lasting_obstacle(module: nn.Module) -> str | None:
    """What keeps ``module`` from the packed path at every call, as it is now."""
    if not isinstance(module, modeling_distilbert.Transformer) or not len(module.layer):
        return None
    attention = attention_obstacle(module.layer[0].attention.config, _KIND.eager_attention)
    return attention or encoder_obstacle(module, _KIND)


INTEGRATION = DistilBert()
