# SPDX-License-Identifier: BSD-3-Clause
"""A text encoder's call as one call into the engine, from ids to output: on short texts what transformers does around
the layers takes as long as they do.

It is taken where nothing but ids, mask and token types is given and the call could go packed (text_batch.py). Whether
it could is found out once, and again after anything about the model has changed.
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
from ..modules.eligibility import autocasts, has_plain_tensors
from ..recording import is_exported
from .eligibility import captures_outputs, implementation_reason, is_as_built, mode_reason
from .stack import may_read_padding
from .text_batch import arguments_of, encoder_of, packed_batch_of
from .varlen import PackedEncoder, TextEncoder

_READ = ("input_ids", "attention_mask", "token_type_ids")
_INTEGERS = (torch.int64, torch.int32)


class WholeCall(Prepared):
    """What a call of a model needs, and what that was made from.

    Attributes:
        weights: as the engine reads them; None where a part of the model is of a kind that it does not know.
        takes_types: whether a call may give token types.
    """

    __slots__ = ("_configs", "_layers", "_modules", "_state", "_tensors", "takes_types", "weights")

    def __init__(
        self, model: nn.Module, encoder: PackedEncoder, ids: Tensor, configs: tuple[PreTrainedConfig, ...]
    ) -> None:
        """``configs`` are all that a call reads. Raises ValueError where a call on ``ids`` cannot go packed, which says
        why."""
        # What changes from here on, by another thread, is found changed at the next call.
        _, *modules = model.modules()
        self._modules, self._configs = tuple(modules), configs
        self._state = extension.module_state((model, *modules, *configs), Prepared)
        batch = packed_batch_of(model, encoder, encoder.text_encoder, {"input_ids": ids})
        if isinstance(batch, str) or not isinstance(batch.layers, PreparedLayers):
            raise ValueError(batch)
        self._layers = batch.layers
        self._tensors: WeightState | None = None
        self.weights: extension.TextWeights | None = None
        self._prepare(model, encoder.text_encoder, batch.layers)

    def _prepare(self, model: nn.Module, text_encoder: TextEncoder, layers: PreparedLayers) -> None:
        embeddings, pooler = model.embeddings, model._modules.get("pooler")
        if pooler is not None and not _is_known(pooler, text_encoder):
            return
        names = [name for name in embeddings.tables if f"{name}_embeddings" in embeddings._modules]
        words, positions, *types = (embeddings._modules[f"{name}_embeddings"].weight for name in names)
        ids = [embeddings.position_ids, *(embeddings._buffers.get(f"{name}_ids") for name in names[2:])]
        norm, dtype = embeddings.LayerNorm, words.dtype
        between = [model._modules[name] for name in text_encoder.between if name in model._modules]
        linears = between if pooler is None else [*between, pooler.dense]
        parameters = [words, positions, *types, norm.weight, norm.bias]
        parameters += [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
        tensors = [tensor for tensor in (*parameters, *ids) if tensor is not None]
        if not has_plain_tensors(tensors) or not all(tensor.is_cpu for tensor in tensors):
            return
        if any(each is not None and each.dtype not in _INTEGERS for each in ids):
            return
        if any(linear.weight.dtype != dtype for linear in linears):
            return
        self._tensors = WeightState(tensors)
        if not self._tensors.is_watchable():
            return
        self.takes_types = names[2:3] == ["token_type"]
        self.weights = extension.TextWeights(
            words=words,
            positions=positions,
            position_ids=ids[0],
            padding_id=embeddings.padding_id(),
            types=list(zip(types, ids[1:], strict=True)),
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
            and (self._tensors is None or self._tensors.is_current())
            and self._layers.has_current_weights()
        )

    def requires_grad(self) -> bool:
        return self._layers.requires_grad() or (self._tensors is not None and self._tensors.requires_grad())

    def attention_reason(self, text_encoder: TextEncoder) -> str | None:
        """What about the attention's implementation, as its library has it now, keeps a call from this one."""
        for config in self._configs:
            reason = implementation_reason(config, text_encoder.layer.eager_attention)
            if reason is not None:
                return reason
        return None


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
    if arguments is None or not _is_simple(arguments):
        return None
    text_encoder = encoder.text_encoder
    ids, mask, types = (arguments.get(name) for name in _READ)
    if autocasts() or captures_outputs() or mode_reason(ids, text_encoder.model_originals) is not None:
        return None
    whole = _current(model, encoder, ids)
    if whole is None or whole.weights is None or (types is not None and not whole.takes_types):
        return None
    if torch.is_grad_enabled() and whole.requires_grad():
        return None
    if whole.attention_reason(text_encoder) is not None:
        return None
    output = extension.encode_text(whole.weights, ids, mask, types, not may_read_padding(encoder.padding))
    if output is None:
        return None
    record(encoder, "packed")
    hidden, pooled = output
    return text_encoder.output(hidden) if pooled is None else text_encoder.output(hidden, pooled)


def _is_simple(arguments: dict[str, Any]) -> bool:
    """Whether they are ids, mask and token types of one padded batch, and nothing that changes what is computed."""
    for name, value in arguments.items():
        default = name == "return_dict"  # of all flags the one that is on
        if name not in _READ and value is not None and value is not default:
            return False
    ids, mask, types = (arguments.get(name) for name in _READ)
    return (
        type(ids) is Tensor
        and ids.is_cpu
        and ids.dim() == 2
        and ids.numel() > 0
        and ids.dtype in _INTEGERS
        and (mask is None or (type(mask) is Tensor and mask.is_cpu and mask.shape == ids.shape))
        and (types is None or (type(types) is Tensor and types.is_cpu and types.shape == ids.shape))
        and (types is None or types.dtype in _INTEGERS)
    )


def _current(model: nn.Module, encoder: PackedEncoder, ids: Tensor) -> WholeCall | None:
    """What ``model`` keeps, made anew where anything has changed; None where its calls do not go packed now."""
    whole = model.__dict__.get(PREPARED)
    if isinstance(whole, WholeCall) and whole.is_current(model):
        return whole
    model.__dict__.pop(PREPARED, None)
    # Most calls that have to go another way are known by less than the state of all modules. What is made of parameters
    # from inference mode, which count no changes, is not kept.
    parameters = list(model.parameters())
    if not parameters or parameters[0].is_inference():
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return None
    batch = packed_batch_of(model, encoder, encoder.text_encoder, {"input_ids": ids})
    if isinstance(batch, str) or not isinstance(batch.layers, PreparedLayers):
        return None
    configs = {id(each): each for each in (model.config, *encoder.layer_stack().configs, *batch.layers.configs)}
    if not all(isinstance(config, PreTrainedConfig) and config.return_dict for config in configs.values()):
        return None
    try:
        whole = WholeCall(model, encoder, ids, tuple(configs.values()))
    except ValueError:
        return None
    model.__dict__[PREPARED] = whole
    return whole
