# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's BERT and the models built like it. In inference the encoder runs on packed batches, padding-free from
before the embeddings to after the last layer; with grad, or where anything about a call asks for the original
computation, that is what runs, with the residual adds and norms fused.

The way a call takes is decided by the call: see ``layers_to_run`` for what keeps it from the packed path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .. import functional
from ..engine.linear import LinearShape
from ..engine.packing import pack
from .bert_layers import Classes
from .fused_norm import NORMS
from .layer_kind import acts, linear_shapes
from .packed_layers import (
    WITHOUT_EFFECT,
    encode_packed,
    encoder_obstacle,
    layers_to_run,
    log_obstacle,
    packed_batch_of_encoder,
)
from .replace import Finding, is_replaced, named_modules, original_class
from .transformers import (
    PackedBatch,
    attention_obstacle,
    carrying,
    hides_first_position,
    is_as_built,
    packing_of_mask,
    stand_in,
    stood_for,
    take_batch,
)


class PackedEmbeddings(nn.Module):
    """Embeds only the tokens of a batch that ``hand_over_mask`` has packed."""

    def first_position(self) -> int:
        """The position of a sequence's first token."""
        return 0

    def positions(self, input_ids: Tensor | None, length: int) -> Tensor:
        """The positions where none are given, ``(batch_size or 1, length)``."""
        return self.position_ids[:, :length]

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        batch = None if torch.compiler.is_compiling() else take_batch(inputs_embeds if input_ids is None else input_ids)
        if batch is None:
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        indices, shape = batch.packing.indices, (batch.packing.batch_size, batch.packing.length)

        def of_tokens(ids: Tensor) -> Tensor:
            return ids.expand(shape).reshape(-1)[indices]

        positions = of_tokens(self.positions(input_ids, shape[1]) if position_ids is None else position_ids)
        types = self.token_type_ids[0, positions] if token_type_ids is None else of_tokens(token_type_ids)
        if inputs_embeds is None:
            words = F.embedding(of_tokens(input_ids), self.word_embeddings.weight)
        else:
            words = pack(inputs_embeds, batch.packing)
        words += F.embedding(types, self.token_type_embeddings.weight)
        tokens = F.embedding(positions, self.position_embeddings.weight)
        norm = self.LayerNorm
        functional.add_layer_norm(tokens, words, norm.normalized_shape, norm.weight, norm.bias, norm.eps, out=tokens)
        return stand_in(tokens, batch)


class PackedEncoder(nn.Module):
    """Runs all layers on packed tokens where nothing about the call and the layers stands against it."""

    classes: Classes

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
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, attention_mask, **others)
        batch = take_batch(hidden_states)
        if batch is not None:
            tokens = stood_for(hidden_states)
        else:
            batch = packed_batch_of_encoder(self, self.classes.kind, self.config, hidden_states, attention_mask, others)
            if isinstance(batch, str):
                log_obstacle(self, batch)
                return super().forward(hidden_states, attention_mask, **others)
            tokens = pack(hidden_states, batch.packing)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=encode_packed(self, tokens, batch))


_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_OUTPUT_FLAGS = ("output_attentions", "output_hidden_states")


def hand_over_mask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the model: its input goes on carrying the packed batch, where there can be one.

    Nobody reads the mask then. But the model would make one of length by length of it, which costs more than the
    embeddings, so it goes on as one of four dimensions, which is taken as it is.
    """
    if torch.compiler.is_compiling() or len(args) > len(_ARGUMENTS):
        return None
    given = dict(zip(_ARGUMENTS, args, strict=False))
    if not given.keys().isdisjoint(kwargs):
        return None
    arguments = given | kwargs
    batch = _packed_batch_of_model(model, arguments)
    if isinstance(batch, str):
        return None
    name = "inputs_embeds" if arguments.get("input_ids") is None else "input_ids"
    changed = {name: carrying(arguments[name], batch)}
    mask = arguments.get("attention_mask")
    if mask is not None and not model._forward_hooks and model.config._attn_implementation == "sdpa":
        changed["attention_mask"] = mask.to(torch.bool)[:, None, None]
    args = tuple(changed.get(name, value) for name, value in given.items())
    return args, kwargs | {name: value for name, value in changed.items() if name not in given}


def _packed_batch_of_model(model: nn.Module, arguments: dict[str, Any]) -> PackedBatch | str:
    """What the model's call with these arguments packs; or why the embeddings cannot be packed.

    Where only they cannot, the encoder will still find out that it can.
    """
    embeddings, encoder = model.embeddings, model.encoder
    if not isinstance(encoder, PackedEncoder):
        return "the encoder is not replaced"
    classes = encoder.classes
    for method in ("forward", "_create_attention_masks"):
        if method in model.__dict__ or getattr(type(model), method) is not getattr(classes.model, method):
            return f"the model has a {method} of its own"
    if next(reversed(model._forward_pre_hooks.values())) is not hand_over_mask:
        return "another pre-hook comes later"
    if any(arguments.get(flag, getattr(model.config, flag, False)) for flag in _OUTPUT_FLAGS):
        return "hidden states or attention weights are asked for"
    if not is_as_built(encoder, classes.replacement("encoder")) or not _embeddings_as_built(embeddings, classes):
        return "embeddings or encoder have hooks or are not as they were built"
    x = arguments.get("input_ids")
    x = arguments.get("inputs_embeds") if x is None else x
    key_mask = arguments.get("attention_mask")
    if x is None or x.dim() < 2 or x.size(1) + embeddings.first_position() > embeddings.position_ids.size(1):
        return "the arguments are not valid"
    others = {
        name: value for name, value in arguments.items() if name not in (*_ARGUMENTS, *WITHOUT_EFFECT, "use_cache")
    }
    dtype = embeddings.word_embeddings.weight.dtype
    layers = layers_to_run(encoder, classes.kind, encoder.config, x, dtype, others)
    if isinstance(layers, str):
        return layers
    if key_mask is not None:
        if key_mask.shape != x.shape[:2]:
            return "the attention mask is not that of a padded batch"
        key_mask = key_mask.to(torch.bool)
        if model.pooler is not None and hides_first_position(key_mask):
            return "a pooler reads position 0, which is hidden"
    return PackedBatch(packing_of_mask(key_mask, *x.shape[:2]), layers)


def _embeddings_as_built(embeddings: nn.Module, classes: Classes) -> bool:
    parts = embeddings._modules
    tables = [parts.get(f"{name}_embeddings") for name in ("word", "position", "token_type")]
    return (
        is_as_built(embeddings, *classes.either("embeddings"))
        and all(is_as_built(table, nn.Embedding) and table.max_norm is None for table in tables)
        and len({table.weight.dtype for table in tables}) == 1
        and is_as_built(parts["LayerNorm"], *NORMS)
        and is_as_built(parts["dropout"], nn.Dropout)
        and not acts(parts["dropout"])
    )


class BertFamily:
    """The integration of the models of one library module that is built like transformers' for BERT."""

    def __init__(self, classes: Classes, replacements: Iterable[type[nn.Module]]) -> None:
        self.classes = classes
        classes.replacements.update((replacement.__bases__[-1], replacement) for replacement in replacements)

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
        for _, bert in named_modules(model, self.classes.model):
            encoder = getattr(bert, "encoder", None)
            if hand_over_mask in bert._forward_pre_hooks.values() or (encoder is not None and is_replaced(encoder)):
                yield bert, hand_over_mask

    def linear_shapes(self, model: nn.Module) -> Iterator[LinearShape]:
        """Of the products that the packed path of ``model`` has."""
        return linear_shapes(model, self.classes.kind)

    def _lasting_obstacle(self, module: nn.Module) -> str | None:
        """What keeps ``module`` from the packed path at every call, as it is now."""
        classes = self.classes
        if isinstance(module, classes.encoder):
            attention = attention_obstacle(module.config, classes.eager_attention)
            return attention or encoder_obstacle(module, classes.kind)
        if isinstance(module, classes.embeddings) and not _embeddings_as_built(module, classes):
            return "embeddings have hooks or are not as they were built"
        return None


def _is_inside(parents: list[str], name: str) -> bool:
    return any(not parent or name.startswith(f"{parent}.") for parent in parents)
