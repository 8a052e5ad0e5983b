# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's text encoders from before the embeddings on: the model packs the batch (text_batch.py), the embeddings
embed its tokens, the encoder runs its layers on them.

The way a call takes is decided by the call: see ``layers_to_run`` for what keeps it from the packed path. The mask is
known before the embeddings and used in the encoder. Between them the packed batch travels on the tensors themselves: a
tensor that carries one is a new Python object, so calls in several threads cannot meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .. import functional
from ..engine.packing import pack
from ..modules.dropout import dropout
from ..modules.eligibility import is_plain
from ..modules.originals import Originals, forwards
from ..modules.padding import PaddingChoice
from .block import NORMS
from .eligibility import is_as_built
from .replace import Replacement, original_forward
from .spec import TransformersLayer, names_read_by
from .stack import (
    LayerStack,
    PackedBatch,
    encode,
    encode_packed,
    encode_traced,
)

# What of a model hands input_ids on to the embeddings, and the mask and the embeddings to the encoder.
MODEL_METHODS = ("forward", "_create_attention_masks")


@dataclass(frozen=True)
class TextEncoder:
    """How a library's text encoder is made.

    Attributes:
        model: its class.
        arguments: of its forward, in their order, as far as packing knows them.
        embeddings: the class of its embeddings, and the one that takes their place.
        encoder: the class that takes the encoder's place.
        encoder_name: the attribute that holds the encoder.
        layer: how the encoder's layers are made.
        between: the attributes that may hold a linear layer between embeddings and encoder.
        output: what its forward returns.
        pooler: the class of its pooler, if it may have one.
    """

    model: type[nn.Module]
    arguments: tuple[str, ...]
    embeddings: tuple[type[nn.Module], type[PackedEmbeddings]]
    encoder: type[PackedEncoder]
    encoder_name: str
    layer: TransformersLayer
    between: tuple[str, ...] = ()
    output: type[ModelOutput] = BaseModelOutput
    pooler: type[nn.Module] | None = None

    @cached_property
    def originals(self) -> Originals:
        """What a packed call of the encoder stands for."""
        return self.layer.originals + forwards(self.encoder.__bases__[-1])

    @cached_property
    def model_originals(self) -> Originals:
        """What a packed call of the whole model stands for."""
        functions = Originals(*((self.model, method) for method in MODEL_METHODS if hasattr(self.model, method)))
        others = forwards(self.embeddings[0], nn.Embedding, *([] if self.pooler is None else [self.pooler]), nn.Tanh)
        places = [(F, "embedding"), (torch, "tanh")]
        if hasattr(self.layer.library, "create_bidirectional_mask"):
            places.append((self.layer.library, "create_bidirectional_mask"))
        return self.originals + functions + others + Originals(*places)

    @cached_property
    def names_read(self) -> frozenset[str]:
        """The names of arguments that the encoder's forward or a layer's does anything with."""
        return self.layer.names_read | names_read_by(self.encoder.__bases__[-1].forward)


class PackedEncoder(Replacement, PaddingChoice, nn.Module):
    """Runs all layers on packed tokens where nothing about the call and the layers stands against it.

    Attributes:
        padding: ``"auto"``: padded positions are skipped without grad, and are zeros, but where a loss reads them;
            ``"skip"``: there and in training too; ``"compute"``: they are computed. Where position 0 is hidden they
            are computed.
        text_encoder: how its model is made.
    """

    chooses_path = True

    text_encoder: TextEncoder

    def layer_stack(self, owner: nn.Module | None = None) -> LayerStack:
        text_encoder, config = self.text_encoder, self.attention_config()
        configs = [] if config is None else [config]
        return LayerStack(
            owner=self if owner is None else owner,
            layers=self.layer,
            spec=text_encoder.layer,
            caller=self,
            configs=configs,
            originals=text_encoder.originals,
            names_read=text_encoder.names_read,
            padding=self.padding,
            trains=True,
        )

    def attention_config(self) -> PreTrainedConfig | None:
        """What names the attention's implementation; None where that is not known."""
        return self.config

    def encode(self, hidden_states: Tensor, attention_mask: Tensor | None, arguments: dict[str, Any]) -> Tensor | None:
        """The last layer's output; None where the original computation is to run."""
        if torch.compiler.is_compiling():
            return encode_traced(
                self, self, self.layer, self.text_encoder.layer, hidden_states, attention_mask, arguments
            )
        batch = take_batch(hidden_states)
        if batch is not None:
            return encode_packed(self.layer_stack(), _tokens_of(hidden_states), batch)
        return encode(self.layer_stack(), hidden_states, attention_mask, arguments)


class PackedEmbeddings(Replacement, nn.Module):
    """Embeds only the tokens of a batch that the model has packed."""

    tables: tuple[str, ...] = ("word", "position")  # what these hold for a token is added up and normalised

    def padding_id(self) -> int | None:
        """The id whose tokens are not counted by the positions of the others, which come after its number; None where
        positions are ``position_ids``, whatever the ids."""
        return None

    def positions(self, input_ids: Tensor | None, length: int) -> Tensor:
        """The positions where none are given, ``(batch_size or 1, length)``."""
        return self.position_ids[:, :length]

    def embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor | None,
        types: dict[str, Tensor | None] | None = None,
    ) -> Tensor | None:
        """A placeholder for the embeddings; None where the original computation is to run.

        ``types`` are the ids for further tables, by their names; None, that the buffer of that name has them, or where
        there is none that they are zeros.
        """
        batch = None if torch.compiler.is_compiling() else take_batch(inputs_embeds if input_ids is None else input_ids)
        if batch is None:
            return None
        packing = batch.packing

        def of_tokens(ids: Tensor) -> Tensor:
            return ids.expand(packing.batch_size, packing.length).reshape(-1)[packing.indices]

        positions = of_tokens(self.positions(input_ids, packing.length) if position_ids is None else position_ids)
        if inputs_embeds is None:
            words = _look_up(self.word_embeddings, of_tokens(input_ids))
        else:
            words = pack(inputs_embeds, packing)
        for name, ids in (types or {}).items():
            table = self._modules.get(f"{name}_embeddings")
            if table is not None:
                default = self._buffers.get(f"{name}_ids")
                if ids is None:
                    ids = torch.zeros_like(positions) if default is None else default[0, positions]
                else:
                    ids = of_tokens(ids)
                # Under grad not in place: a hook may have made a leaf of the words.
                words = torch.add(words, _look_up(table, ids), out=None if torch.is_grad_enabled() else words)
        tokens, norm = _look_up(self.position_embeddings, positions), self.LayerNorm
        out = None if torch.is_grad_enabled() else tokens
        tokens = functional.add_layer_norm(
            tokens, words, norm.normalized_shape, norm.weight, norm.bias, norm.eps, out=out
        )
        if self.dropout.training and self.dropout.p > 0.0:
            tokens = dropout(tokens, self.dropout.p)
        return _placeholder(tokens, batch)


def packed_or_original(
    embeddings: nn.Module,
    arguments: tuple,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    types: dict[str, Tensor | None] | None = None,
) -> Tensor:
    """What ``embeddings.embed`` gives of these, or the original's forward of ``arguments``."""
    forward = original_forward(embeddings, PackedEmbeddings)
    if forward is not None:
        return forward(*arguments)
    packed = embeddings.embed(input_ids, inputs_embeds, position_ids, types)
    return type(embeddings)._original.forward(embeddings, *arguments) if packed is None else packed


class PackedLinear(Replacement, nn.Linear):
    """A linear layer between embeddings and encoder, of the tokens alone."""

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return F.linear(input, self.weight, self.bias)
        batch = None if torch.compiler.is_compiling() or not isinstance(self, PackedLinear) else take_batch(input)
        if batch is None:
            return nn.Linear.forward(self, input)
        return _placeholder(nn.Linear.forward(self, _tokens_of(input)), batch)


def embeddings_as_built(embeddings: nn.Module, text_encoder: TextEncoder) -> bool:
    parts, (_, replacement) = embeddings._modules, text_encoder.embeddings
    tables = [parts[f"{name}_embeddings"] for name in replacement.tables if f"{name}_embeddings" in parts]
    return (
        is_as_built(embeddings, *text_encoder.embeddings)
        and {"word_embeddings", "position_embeddings", "LayerNorm", "dropout"} <= parts.keys()
        and "position_ids" in embeddings._buffers
        and all(_is_table(table) for table in tables)
        and len({table.weight.dtype for table in tables}) == 1
        and is_as_built(parts["LayerNorm"], *NORMS)
        and tuple(parts["LayerNorm"].normalized_shape) == (tables[0].embedding_dim,)
        and is_as_built(parts["dropout"], nn.Dropout)
    )


def _is_table(module: nn.Module | None) -> bool:
    """Whether what ``module`` gives for an id, and the gradient, depend on that id alone."""
    if not is_plain(module, nn.Embedding, are_idle=_only_ask_for_grad):
        return False
    return module.max_norm is None and not module.scale_grad_by_freq


def _only_ask_for_grad(hooks: Iterable[Callable]) -> bool:
    """Whether all are what transformers puts on embeddings where layers are checkpointed: it reads no values."""
    known = ("transformers.modeling_utils", "make_inputs_require_grads")
    return all((getattr(each, "__module__", None), getattr(each, "__name__", None)) == known for each in hooks)


def _look_up(table: nn.Embedding, ids: Tensor) -> Tensor:
    if table._forward_hooks:
        return table(ids)
    return F.embedding(ids, table.weight, table.padding_idx, sparse=table.sparse)


def carrying(tensor: Tensor, batch: PackedBatch) -> Tensor:
    """``tensor`` as a new object that carries ``batch``."""
    alias = tensor.view_as(tensor)
    alias._resnorm_batch = batch
    return alias


def take_batch(tensor: Tensor | None) -> PackedBatch | None:
    """The batch that ``tensor`` carries, and from now on no longer."""
    return None if tensor is None else tensor.__dict__.pop("_resnorm_batch", None)


def _placeholder(tokens: Tensor, batch: PackedBatch) -> Tensor:
    """``(batch_size, length, dim)`` for packed ``tokens``: shape, dtype and device for whoever asks, no values.

    NaN throughout, so that a computation on it cannot go unnoticed.
    """
    shape = (batch.packing.batch_size, batch.packing.length, tokens.size(-1))
    padded = tokens.new_full((), torch.nan).expand(shape)
    padded._resnorm_batch, padded._resnorm_tokens = batch, tokens
    return padded


def _tokens_of(placeholder: Tensor) -> Tensor:
    """The tokens that ``_placeholder`` was given."""
    return placeholder._resnorm_tokens
