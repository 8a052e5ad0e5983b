# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's DistilBERT. In inference it runs on packed batches; else residual adds and norms are fused."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.jit import is_scripting
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert

from ...engine.spec import Dropouts
from ...modules.tracing import for_torchscript
from ..block import add_norm
from ..family import Family
from ..replace import Replacement, original_forward
from ..spec import TransformersLayer
from ..text_model import text_model
from ..varlen import PackedEmbeddings, PackedEncoder, TextEncoder, packed_or_original


class DistilBertBlock(Replacement, modeling_distilbert.TransformerBlock):
    """Residual add and layer norm in one pass."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        forward = original_forward(self, DistilBertBlock)
        if forward is not None:
            return forward(hidden_states, attention_mask, **kwargs)
        update, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = add_norm(update, hidden_states, self.sa_layer_norm)
        return add_norm(self.ffn(hidden_states), hidden_states, self.output_layer_norm)


class DistilBertEmbeddings(PackedEmbeddings, modeling_distilbert.Embeddings):
    _torch_forward = for_torchscript(modeling_distilbert.Embeddings.forward)

    # input_ids may be None all the same: TorchScript compares types with the library's, and this is its.
    def forward(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if is_scripting():
            return self._torch_forward(input_ids, inputs_embeds, position_ids)
        arguments = (input_ids, inputs_embeds, position_ids)
        return packed_or_original(self, arguments, input_ids, inputs_embeds, position_ids)


class DistilBertTransformer(PackedEncoder, modeling_distilbert.Transformer):
    def attention_config(self) -> PreTrainedConfig | None:
        """Its first layer's, because it has none itself."""
        layer = next(iter(self.layer), None)
        return getattr(getattr(layer, "attention", None), "config", None)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        forward = original_forward(self, DistilBertTransformer)
        if forward is not None:
            return forward(hidden_states, attention_mask, **kwargs)
        output = self.encode(hidden_states, attention_mask, kwargs)
        if output is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=output)


_LAYER = TransformersLayer(
    types=(modeling_distilbert.TransformerBlock, DistilBertBlock),
    parts={"attention": (modeling_distilbert.DistilBertSelfAttention,), "ffn": (modeling_distilbert.FFN,)},
    attention="attention",
    head_dim="attention_head_size",
    projections=("attention.q_lin.", "attention.k_lin.", "attention.v_lin."),
    attention_output="attention.out_lin.",
    attention_norm="sa_layer_norm",
    intermediate="ffn.lin1.",
    activation=("ffn", "activation"),
    output="ffn.lin2.",
    feed_forward_norm="output_layer_norm",
    dropouts=Dropouts(("attention.dropout", "p"), update=("ffn.dropout", "p")),
    methods=(("ffn", "ff_chunk"),),
)
DistilBertTransformer.text_encoder = TextEncoder(
    model=modeling_distilbert.DistilBertModel,
    arguments=("input_ids", "attention_mask", "inputs_embeds", "position_ids"),
    embeddings=(modeling_distilbert.Embeddings, DistilBertEmbeddings),
    encoder=DistilBertTransformer,
    encoder_name="transformer",
    layer=_LAYER,
)
DistilBertModel = text_model(DistilBertTransformer.text_encoder, __name__)
INTEGRATION = Family(
    _LAYER,
    (DistilBertBlock, DistilBertEmbeddings, DistilBertTransformer, DistilBertModel),
    text_encoder=DistilBertTransformer.text_encoder,
)
