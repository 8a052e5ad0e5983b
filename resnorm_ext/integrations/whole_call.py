# SPDX-License-Identifier: BSD-3-Clause
"""A text encoder's call as one call into the engine, from ids to output: on short texts what transformers does around
the layers takes as long as they do.

It is taken where nothing but ids, mask and token types is given and the call could go packed (text_batch.py). What is
looked at to know that is not looked at again until anything about the model changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ..build.extension import extension
from ..engine.linear import LinearShape, choose_backends, prepare_linear
from ..engine.prepared import PREPARED, Prepared, PreparedLayers
from ..engine.weights import WeightState
from ..modules.calls import record
from ..modules.eligibility import autocasts
from ..recording import is_exported
from .eligibility import captures_outputs, implementation_reason, is_as_built, mode_reason
from .stack import may_read_padding
from .text_batch import arguments_of, encoder_of, packed_batch_of
from .varlen import PackedEncoder, TextEncoder

_READ = ("input_ids", "attention_mask", "token_type_ids")


class WholeCall(Prepared):
    """What a call of a model needs, and what that was made from.

    Attributes:
        encoder: the engine's; None where the model's pooler is not as it was built, or it has none of a kind known.
        takes_types: whether a call may give token types.
    """

    __slots__ = ("_configs", "_layers", "_modules", "_state", "_weights", "encoder", "takes_types")

    def __init__(self, model: nn.Module) -> None:
        """Only what ``model`` is now, so that what changes while it is looked at is found changed at the next call."""
        _, *modules = model.modules()
        configs = (getattr(each, "config", None) for each in model.modules())
        self._modules = tuple(modules)
        self._configs = tuple({id(each): each for each in configs if isinstance(each, PreTrainedConfig)}.values())
        self._state = extension.module_state((model, *self._modules, *self._configs), Prepared)
        self._weights = WeightState((*model.parameters(), *model.buffers()))
        self.encoder: extension.TextEncoder | None = None

    def prepare(self, model: nn.Module, text_encoder: TextEncoder, layers: PreparedLayers) -> None:
        self._layers = layers
        embeddings, pooler = model.embeddings, model._modules.get("pooler")
        dtype = embeddings.word_embeddings.weight.dtype
        between = [model._modules[name] for name in text_encoder.between if name in model._modules]
        if pooler is not None and not _is_known(pooler, text_encoder):
            return
        linears = between if pooler is None else [*between, pooler.dense]
        if not all(linear.weight.is_cpu and linear.weight.dtype == dtype for linear in linears):
            return
        tables = {name: embeddings._modules.get(f"{name}_embeddings") for name in embeddings.tables}
        types = [(name, tables[name]) for name in embeddings.tables[2:] if tables[name] is not None]
        self.takes_types = any(name == "token_type" for name, _ in types[:1])
        norm = embeddings.LayerNorm
        self.encoder = extension.TextEncoder(
            words=tables["word"].weight,
            positions=tables["position"].weight,
            position_ids=embeddings.position_ids,
            padding_id=embeddings.padding_id(),
            types=[(table.weight, embeddings._buffers.get(f"{name}_ids")) for name, table in types],
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            projection=_prepared(between[0], dtype) if between else None,
            layers=layers.layers,
            stream=layers.precision.stream,
            pooler=None if pooler is None else _prepared(pooler.dense, layers.precision.products),
        )

    def is_current(self, model: nn.Module) -> bool:
        return (
            extension.has_module_state((model, *self._modules, *self._configs), self._state, Prepared)
            and self._weights.is_current()
            and self._layers.has_chosen_backends()
        )

    def is_watchable(self) -> bool:
        return self._weights.is_watchable()

    def requires_grad(self) -> bool:
        return self._weights.requires_grad()


def _is_known(pooler: nn.Module, text_encoder: TextEncoder) -> bool:
    parts = pooler._modules
    return (
        text_encoder.pooler is not None
        and is_as_built(pooler, text_encoder.pooler)
        and is_as_built(parts.get("dense"), nn.Linear)
        and is_as_built(parts.get("activation"), nn.Tanh)
    )


def _prepared(linear: nn.Linear, dtype: torch.dtype) -> extension.PreparedLinear:
    choose_backends([LinearShape(dtype, linear.in_features, linear.out_features)])
    return prepare_linear((linear.weight, linear.bias), dtype=dtype)


def call_whole(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ModelOutput | None:
    """The output of ``model`` for these arguments; None where another way is to be taken."""
    encoder = None if is_exported() else encoder_of(model)
    arguments = None if encoder is None else arguments_of(encoder.text_encoder, args, kwargs)
    if arguments is None or not _is_plain(arguments):
        return None
    text_encoder = encoder.text_encoder
    ids, mask, types = (arguments.get(name) for name in _READ)
    if autocasts() or captures_outputs() or mode_reason(ids, text_encoder.model_originals) is not None:
        return None
    whole = _current(model, encoder, ids)
    if whole is None or whole.encoder is None or (types is not None and not whole.takes_types):
        return None
    if torch.is_grad_enabled() and whole.requires_grad():
        return None
    if implementation_reason(model.config, text_encoder.layer.eager_attention) is not None:
        return None
    output = extension.encode_text(whole.encoder, ids, mask, types, not may_read_padding(encoder.padding))
    if output is None:
        return None
    record(encoder, "packed")
    hidden, pooled = output
    return text_encoder.output(hidden) if pooled is None else text_encoder.output(hidden, pooled)


def _is_plain(arguments: dict[str, Any]) -> bool:
    """Whether they are ids, mask and token types of one padded batch, and nothing that changes what is computed."""
    for name, value in arguments.items():
        if name not in _READ and value is not None and value is not (name == "return_dict"):
            return False
    ids, mask, types = (arguments.get(name) for name in _READ)
    return (
        type(ids) is Tensor
        and ids.dim() == 2
        and ids.numel() > 0
        and ids.dtype in (torch.int64, torch.int32)
        and (mask is None or (type(mask) is Tensor and mask.is_cpu and mask.shape == ids.shape))
        and (types is None or (type(types) is Tensor and types.is_cpu and types.shape == ids.shape))
        and (types is None or types.dtype in (torch.int64, torch.int32))
    )


def _current(model: nn.Module, encoder: PackedEncoder, ids: Tensor) -> WholeCall | None:
    """What ``model`` keeps, made anew where anything has changed; None where its calls do not go packed now."""
    whole = model.__dict__.get(PREPARED)
    if isinstance(whole, WholeCall) and whole.is_current(model):
        return whole
    model.__dict__.pop(PREPARED, None)

    call = (model, encoder, encoder.text_encoder, {"input_ids": ids})
    # Most calls that have to go another way are known by less than the state of all modules. What is made of parameters
    # from inference mode, which count no changes, is not kept.
    if next(model.parameters()).is_inference() or not model.config.return_dict:
        return None
    if isinstance(packed_batch_of(*call), str):
        return None
    whole = WholeCall(model)
    batch = packed_batch_of(*call)
    if isinstance(batch, str) or not whole.is_watchable():
        return None
    whole.prepare(model, encoder.text_encoder, batch.layers)
    model.__dict__[PREPARED] = whole
    return whole
