# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's text encoders from before the embeddings on: a pre-hook of the model packs the batch, the embeddings
embed its tokens, the encoder runs its layers on them.

The way a call takes is decided by the call: see ``layers_to_run`` for what keeps it from the packed path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .. import functional
from ..engine.packing import pack
from ..modules.calls import record
from ..modules.originals import Originals, forwards
from ..modules.padding import PaddingChoice
from ..recording import is_exported
from .fused_norm import NORMS
from .layer_kind import LayerKind, acts, names_read_by
from .packed_layers import encode_packed, layers_to_run, packed_batch_of_encoder, padding_obstacle
from .replace import Replacement, named_modules
from .transformers import (
    PackedBatch,
    carrying,
    implementation_obstacle,
    is_as_built,
    packing_of_mask,
    stand_in,
    stood_for,
    take_batch,
)

# What of a model hands input_ids on to the embeddings, and the mask and the embeddings to the encoder.
_MODEL_METHODS = ("forward", "_create_attention_masks")


@dataclass(frozen=True)
class ModelKind:
    """How a library's text encoder is made.

    Attributes:
        model: its class.
        arguments: of its forward, in their order, as far as packing knows them.
        embeddings: the class of its embeddings, and the one that takes their place.
        encoder: the class that takes the encoder's place.
        encoder_name: the attribute that holds the encoder.
        layer: how the encoder's layers are made.
    """

    model: type[nn.Module]
    arguments: tuple[str, ...]
    embeddings: tuple[type[nn.Module], type[PackedEmbeddings]]
    encoder: type[PackedEncoder]
    encoder_name: str
    layer: LayerKind

    @cached_property
    def originals(self) -> Originals:
        """What a packed call of the encoder stands for."""
        return self.layer.originals + forwards(self.encoder.__bases__[-1])

    @cached_property
    def model_originals(self) -> Originals:
        """What a packed call of the whole model stands for."""
        functions = Originals(*((self.model, method) for method in _MODEL_METHODS if hasattr(self.model, method)))
        embedding = forwards(self.embeddings[0], nn.Embedding) + Originals((F, "embedding"))
        return self.originals + functions + embedding

    @cached_property
    def names_read(self) -> frozenset[str]:
        """The names of arguments that the encoder's forward or a layer's does anything with."""
        return self.layer.names_read | names_read_by(self.encoder.__bases__[-1].forward)


class PackedEncoder(Replacement, PaddingChoice, nn.Module):
    """Runs all layers on packed tokens where nothing about the call and the layers stands against it.

    Attributes:
        padding: ``"auto"``: padded positions are skipped without grad, and are zeros, but where a loss reads them;
            ``"skip"``: there too; ``"compute"``: they are computed. Where position 0 is hidden they are computed.
    """

    chooses_path = True

    model_kind: Callable[[], ModelKind]

    def attention_config(self) -> PreTrainedConfig | None:
        """What names the attention's implementation; None where that is not known."""
        return self.config

    def encode(self, hidden_states: Tensor, attention_mask: Tensor | None, arguments: dict[str, Any]) -> Tensor | None:
        """The last layer's output; None where the original computation is to run."""
        if torch.compiler.is_compiling():
            return None
        batch = take_batch(hidden_states)
        if batch is not None:
            return encode_packed(self, stood_for(hidden_states), batch)
        kind, config = self.model_kind().layer, self.attention_config()
        batch = packed_batch_of_encoder(self, kind, config, hidden_states, attention_mask, arguments)
        if isinstance(batch, str):
            record(self, "original", batch)
            return None
        return encode_packed(self, pack(hidden_states, batch.packing), batch)


class PackedEmbeddings(Replacement, nn.Module):
    """Embeds only the tokens of a batch that ``hand_over_mask`` has packed."""

    tables: tuple[str, ...] = ("word", "position")  # what these hold for a token is added up and normalised

    def first_position(self) -> int:
        """The position of a sequence's first token."""
        return 0

    def positions(self, input_ids: Tensor | None, length: int) -> Tensor:
        """The positions where none are given, ``(batch_size or 1, length)``."""
        return self.position_ids[:, :length]

    def embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor | None:
        """A stand-in for the embeddings; None where the original computation is to run."""
        batch = None if torch.compiler.is_compiling() else take_batch(inputs_embeds if input_ids is None else input_ids)
        if batch is None:
            return None
        packing = batch.packing

        def of_tokens(ids: Tensor) -> Tensor:
            return ids.expand(packing.batch_size, packing.length).reshape(-1)[packing.indices]

        positions = of_tokens(self.positions(input_ids, packing.length) if position_ids is None else position_ids)
        if inputs_embeds is None:
            words = F.embedding(of_tokens(input_ids), self.word_embeddings.weight)
        else:
            words = pack(inputs_embeds, packing)
        if "token_type" in self.tables:
            types = self.token_type_ids[0, positions] if token_type_ids is None else of_tokens(token_type_ids)
            words += F.embedding(types, self.token_type_embeddings.weight)
        tokens = F.embedding(positions, self.position_embeddings.weight)
        norm = self.LayerNorm
        functional.add_layer_norm(tokens, words, norm.normalized_shape, norm.weight, norm.bias, norm.eps, out=tokens)
        return stand_in(tokens, batch)


def embeddings_as_built(embeddings: nn.Module, kind: ModelKind) -> bool:
    parts, (_, replacement) = embeddings._modules, kind.embeddings
    tables = [parts.get(f"{name}_embeddings") for name in replacement.tables]
    return (
        is_as_built(embeddings, *kind.embeddings)
        and all(f"{name}_ids" in embeddings._buffers for name in replacement.tables if name != "word")
        and all(is_as_built(table, nn.Embedding) and table.max_norm is None for table in tables)
        and len({table.weight.dtype for table in tables}) == 1
        and is_as_built(parts["LayerNorm"], *NORMS)
        and tuple(parts["LayerNorm"].normalized_shape) == (tables[0].embedding_dim,)
        and is_as_built(parts["dropout"], nn.Dropout)
        and not acts(parts["dropout"])
    )


_OUTPUT_FLAGS = ("output_attentions", "output_hidden_states")


def hand_over_mask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the model: its input goes on carrying the packed batch, where there can be one.

    Nobody reads the mask then. But the model would make one of length by length of it, which costs more than the
    embeddings, so it goes on as one of four dimensions, which is taken as it is.
    """
    encoder = None if torch.compiler.is_compiling() or is_exported() else _encoder_of(model)
    if encoder is None:
        return None
    kind = encoder.model_kind()
    given = dict(zip(kind.arguments, args, strict=False))
    if len(args) > len(given) or not given.keys().isdisjoint(kwargs):
        return None
    arguments = given | kwargs
    batch = _packed_batch_of_model(model, encoder, kind, arguments)
    if isinstance(batch, str):
        return None
    name = "inputs_embeds" if arguments.get("input_ids") is None else "input_ids"
    changed = {name: carrying(arguments[name], batch)}
    mask = arguments.get("attention_mask")
    if mask is not None and not model._forward_hooks and model.config._attn_implementation == "sdpa":
        changed["attention_mask"] = mask.to(torch.bool)[:, None, None]
    args = tuple(changed.get(name, value) for name, value in given.items())
    return args, kwargs | {name: value for name, value in changed.items() if name not in given}


def packing_hooks(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, Callable]]:
    """The modules of ``model`` of this class that pack their batch, and the hook by which they do."""
    for _, module in named_modules(model, kind):
        if hand_over_mask in module._forward_pre_hooks.values() or _encoder_of(module) is not None:
            yield module, hand_over_mask


def _encoder_of(model: nn.Module) -> PackedEncoder | None:
    """The encoder that the model's forward calls, if it packs."""
    for name, child in model._modules.items():
        if isinstance(child, PackedEncoder) and child.model_kind().encoder_name == name:
            return child
    return None


def _packed_batch_of_model(
    model: nn.Module, encoder: PackedEncoder, kind: ModelKind, arguments: dict[str, Any]
) -> PackedBatch | str:
    """What the model's call with these arguments packs; or why the embeddings cannot be packed.

    Where only they cannot, the encoder will still find out that it can.
    """
    changed = kind.model_originals.reason()
    if changed is not None:
        return changed
    for method in _MODEL_METHODS:
        if method in model.__dict__ or getattr(type(model), method, None) is not getattr(kind.model, method, None):
            return f"the model has a {method} of its own"
    if next(reversed(model._forward_pre_hooks.values())) is not hand_over_mask:
        return "another pre-hook comes later"
    if any(arguments.get(flag, getattr(model.config, flag, False)) for flag in _OUTPUT_FLAGS):
        return "hidden states or attention weights are asked for"
    embeddings = model.embeddings
    if not is_as_built(encoder, kind.encoder) or not embeddings_as_built(embeddings, kind):
        return "embeddings or encoder have hooks or are not as they were built"
    x = arguments.get("input_ids")
    x = arguments.get("inputs_embeds") if x is None else x
    key_mask = arguments.get("attention_mask")
    if x is None or x.dim() < 2 or x.size(1) + embeddings.first_position() > embeddings.position_ids.size(1):
        return "the arguments are not valid"
    config = encoder.attention_config()
    if config is not model.config:  # by whose implementation the mask is made
        reason = implementation_obstacle(model.config, kind.layer.eager_attention)
        if reason is not None:
            return reason
    others = {name: value for name, value in arguments.items() if name not in (*kind.arguments, "use_cache")}
    dtype = embeddings.word_embeddings.weight.dtype
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in embeddings.parameters()):
        return "grad mode is on and the embeddings require grad: use torch.no_grad()"
    layers = layers_to_run(encoder, kind.layer, config, x, dtype, others)
    if isinstance(layers, str):
        return layers
    if key_mask is not None:
        if type(key_mask) is not Tensor or key_mask.shape != x.shape[:2]:
            return "the attention mask is not that of a padded batch"
        key_mask = key_mask.to(torch.bool)
    return padding_obstacle(encoder, key_mask) or PackedBatch(layers, packing_of_mask(key_mask, *x.shape[:2]))
