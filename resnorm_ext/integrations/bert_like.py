# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's BERT and the models that are built like it. In inference the encoder runs on packed batches,
padding-free from before the embeddings to after the last layer; with grad, or where anything about a call asks for the
original computation, that is what runs, with the residual adds and norms fused."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_scripting
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from ..engine.spec import Dropouts
from .block import add_norm
from .family import Family
from .replace import Replacement, original_forward
from .spec import TransformersLayer
from .text_model import text_model
from .varlen import PackedEmbeddings, PackedEncoder, TextEncoder, packed_or_original


class BertLikeEmbeddings(PackedEmbeddings):
    tables = ("word", "position", "token_type")

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        arguments = (input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        types = {"token_type": token_type_ids}
        return packed_or_original(self, arguments, input_ids, inputs_embeds, position_ids, types)


class PositionsFromTokens(BertLikeEmbeddings):
    """Numbers the tokens that are not padding, from the one after the padding's own number on."""

    def padding_id(self) -> int:
        return self.padding_idx

    def positions(self, input_ids: Tensor | None, length: int) -> Tensor:
        if input_ids is None:
            device = self.word_embeddings.weight.device
            return torch.arange(1, length + 1, device=device).unsqueeze(0) + self.padding_idx
        real = input_ids.ne(self.padding_idx).int()
        return (real.cumsum(1, dtype=torch.int32) * real).long() + self.padding_idx


class BertLikeEncoder(PackedEncoder):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        others = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        forward = original_forward(self, BertLikeEncoder)
        if forward is not None:
            return forward(hidden_states, attention_mask, **others)
        output = self.encode(hidden_states, attention_mask, others)
        if output is None:
            return super().forward(hidden_states, attention_mask, **others)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=output)


class FusedOutput(Replacement, nn.Module):
    """Dropout, residual add and layer norm in one pass."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if is_scripting():
            return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)
        forward = original_forward(self, FusedOutput)
        if forward is not None:
            return forward(hidden_states, input_tensor)
        return add_norm(self.dense(hidden_states), input_tensor, self.LayerNorm, self.dropout)


def bert_like(
    name: str,
    library: ModuleType,
    prefix: str,
    *,
    embeddings: type[BertLikeEmbeddings] = BertLikeEmbeddings,
    arguments: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    between: tuple[str, ...] = (),
) -> Family:
    """The integration of the models of a module of transformers whose classes have BERT's names, but for the prefix.

    Args:
        name: of the module that the classes that take their places are put in, under the library's own names.
        library: the module of transformers.
        prefix: that its classes begin with, for BERT's ``Bert``.
        embeddings: how theirs are computed.
        arguments: of the model's forward, in their order, as far as packing knows them.
        between: the model's linear layers between embeddings and encoder, by name.
    """

    def importable(replacement: type[nn.Module]) -> type[nn.Module]:
        setattr(sys.modules[name], replacement.__name__, replacement)
        return replacement

    def replaced(suffix: str, base: type[nn.Module]) -> tuple[type[nn.Module], type[nn.Module]]:
        original = getattr(library, prefix + suffix)
        members = {"__module__": name, "__doc__": base.__doc__}
        return original, importable(type(original.__name__, (base, original), members))

    def original(suffix: str) -> tuple[type[nn.Module]]:
        return (getattr(library, prefix + suffix),)

    self_output, output = replaced("SelfOutput", FusedOutput), replaced("Output", FusedOutput)
    embeddings_classes, encoder = replaced("Embeddings", embeddings), replaced("Encoder", BertLikeEncoder)
    layer = TransformersLayer(
        types=original("Layer"),
        parts={
            "attention": original("Attention"),
            "attention.self": original("SelfAttention"),
            "attention.output": self_output,
            "intermediate": original("Intermediate"),
            "output": output,
        },
        attention="attention.self",
        head_dim="attention_head_size",
        projections=("attention.self.query.", "attention.self.key.", "attention.self.value."),
        attention_output="attention.output.dense.",
        attention_norm="attention.output.LayerNorm",
        intermediate="intermediate.dense.",
        activation=("intermediate", "intermediate_act_fn"),
        output="output.dense.",
        feed_forward_norm="output.LayerNorm",
        dropouts=Dropouts(
            attention_weights=("attention.self.dropout", "p"),
            attention_update=("attention.output.dropout", "p"),
            update=("output.dropout", "p"),
        ),
        methods=(("", "feed_forward_chunk"),),
    )
    pooler = getattr(library, f"{prefix}Pooler", None)
    text_encoder = TextEncoder(
        model=getattr(library, f"{prefix}Model"),
        arguments=arguments,
        embeddings=embeddings_classes,
        encoder=encoder[1],
        encoder_name="encoder",
        layer=layer,
        between=between,
        output=BaseModelOutputWithPastAndCrossAttentions
        if pooler is None
        else BaseModelOutputWithPoolingAndCrossAttentions,
        pooler=pooler,
    )
    encoder[1].text_encoder = text_encoder
    (cross_attention,) = original("CrossAttention")
    return Family(
        layer,
        [
            *(replacement for _, replacement in (self_output, output, embeddings_classes, encoder)),
            importable(text_model(text_encoder, name)),
        ],
        text_encoder=text_encoder,
        left_alone=lambda module: "cross-attention" if isinstance(module, cross_attention) else None,
    )
