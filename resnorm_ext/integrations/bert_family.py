# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's BERT and the models built like it. In inference the encoder runs on packed batches, padding-free from
before the embeddings to after the last layer; with grad, or where anything about a call asks for the original
computation, that is what runs, with the residual adds and norms fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..engine.linear import LinearShape
from .bert_layers import Classes
from .layer_kind import linear_shapes
from .packed_layers import encoder_obstacle
from .packed_model import ModelKind, PackedEmbeddings, PackedEncoder, embeddings_as_built, packing_hooks
from .replace import Finding, named_modules, original_class, original_forward


class PackedBertEmbeddings(PackedEmbeddings):
    tables = ("word", "position", "token_type")

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        forward = original_forward(self, PackedBertEmbeddings)
        if forward is not None:
            return forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        packed = self.embed(input_ids, inputs_embeds, position_ids, token_type_ids)
        if packed is not None:
            return packed
        return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)


class PackedBertEncoder(PackedEncoder):
    classes: Classes

    def model_kind(self) -> ModelKind:
        return self.classes.model_kind

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
        forward = original_forward(self, PackedBertEncoder)
        if forward is not None:
            return forward(hidden_states, attention_mask, **others)
        output = self.encode(hidden_states, attention_mask, others)
        if output is None:
            return super().forward(hidden_states, attention_mask, **others)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=output)


class BertFamily:
    """The integration of the models of one library module that is built like transformers' for BERT."""

    def __init__(self, classes: Classes, replacements: Iterable[type[nn.Module]]) -> None:
        self.classes = classes
        classes.replacements.update((replacement.__bases__[-1], replacement) for replacement in replacements)
        self.originals = classes.model_kind.model_originals  # now, before anybody replaces one for a while

    def find(self, model: nn.Module) -> Iterator[Finding]:
        """The modules of ``model`` that are replaced, and those of their kind that are not."""
        classes, replacements = self.classes, self.classes.replacements
        decoders = [name for name, bert in named_modules(model, classes.model) if bert.config.is_decoder]
        for name, module in model.named_modules():
            replacement = replacements.get(original_class(module))
            if replacement is not None and not _is_inside(decoders, name):
                yield Finding(name, module, replacement, self._lasting_obstacle(module))
            elif isinstance(module, classes.cross_attention):
                yield Finding(name, module, None, "cross-attention")
            elif name in decoders:
                yield Finding(name, module, None, "a decoder: its attention is causal and may have a cache")
            elif isinstance(module, tuple(replacements)) and replacement is None:
                yield Finding(name, module, None, "a subclass, which may compute something else")

    def hooks(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
        """The modules of ``model`` that get a forward pre-hook, and the hook."""
        return packing_hooks(model, self.classes.model)

    def linear_shapes(self, model: nn.Module) -> Iterator[LinearShape]:
        """Of the products that the packed path of ``model`` has."""
        return linear_shapes(model, self.classes.kind)

    def _lasting_obstacle(self, module: nn.Module) -> str | None:
        """What keeps ``module`` from the packed path at every call, as it is now."""
        classes = self.classes
        if isinstance(module, classes.encoder):
            return encoder_obstacle(module, [module.config], classes.kind)
        if isinstance(module, classes.embeddings) and not embeddings_as_built(module, classes.model_kind):
            return "embeddings have hooks or are not as they were built"
        return None


def _is_inside(parents: list[str], name: str) -> bool:
    return any(not parent or name.startswith(f"{parent}.") for parent in parents)
