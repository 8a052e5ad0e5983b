# SPDX-License-Identifier: BSD-3-Clause
"""The layers of Hugging Face's BERT: their blocks with residual add and norm fused, and their weights for the packed
path, if they are as they were built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert

from .. import functional
from ..engine.linear import LinearShape, prepare_linear
from ..engine.post_norm import Norm, PostNormLayer
from ..modules import LayerNorm
from ..modules.eligibility import activation_name
from .replace import named_modules
from .transformers import is_as_built

NORMS = (LayerNorm, nn.LayerNorm)


class BertSelfOutput(modeling_bert.BertSelfOutput):
    """Dropout, residual add and layer norm in one pass."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return _dropout_add_norm(self, self.dense(hidden_states), input_tensor)


class BertOutput(modeling_bert.BertOutput):
    """Dropout, residual add and layer norm in one pass."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return _dropout_add_norm(self, self.dense(hidden_states), input_tensor)


def _dropout_add_norm(block: BertSelfOutput | BertOutput, update: Tensor, residual: Tensor) -> Tensor:
    dropout, norm = block.dropout, block.LayerNorm
    fuses = (
        is_as_built(dropout, nn.Dropout)
        and is_as_built(norm, *NORMS)
        and update.dtype == residual.dtype  # else the sum has the wider one, and so has its norm
        and update.shape == residual.shape
    )
    if not fuses:
        return norm(dropout(update) + residual)
    return functional.add_layer_norm(
        update,
        residual,
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
        dropout_p=dropout.p,
        training=dropout.training,
    )


def acts(dropout: nn.Dropout) -> bool:
    """Whether ``dropout`` drops anything."""
    return dropout.training and dropout.p > 0.0


_PARTS = {
    ("attention",): (modeling_bert.BertAttention,),
    ("attention", "self"): (modeling_bert.BertSelfAttention,),
    ("attention", "self", "query"): (nn.Linear,),
    ("attention", "self", "key"): (nn.Linear,),
    ("attention", "self", "value"): (nn.Linear,),
    ("attention", "self", "dropout"): (nn.Dropout,),
    ("attention", "output"): (BertSelfOutput, modeling_bert.BertSelfOutput),
    ("attention", "output", "dense"): (nn.Linear,),
    ("attention", "output", "dropout"): (nn.Dropout,),
    ("attention", "output", "LayerNorm"): NORMS,
    ("intermediate",): (modeling_bert.BertIntermediate,),
    ("intermediate", "dense"): (nn.Linear,),
    ("output",): (BertOutput, modeling_bert.BertOutput),
    ("output", "dense"): (nn.Linear,),
    ("output", "dropout"): (nn.Dropout,),
    ("output", "LayerNorm"): NORMS,
}


def _parts_as_built(layer: nn.Module) -> list[nn.Module] | str:
    """The modules of ``layer`` in the order of ``_PARTS``; or the name of what is not as it was built, and why."""
    if not is_as_built(layer, modeling_bert.BertLayer):
        return _not_as_built(layer, modeling_bert.BertLayer)
    parts = []
    for path, types in _PARTS.items():
        part: nn.Module | None = layer
        for name in path:
            part = part._modules.get(name)
        if not is_as_built(part, *types):
            return f".{'.'.join(path)}{_not_as_built(part, *types)}"
        parts.append(part)
    return parts


def _not_as_built(module: nn.Module | None, *types: type[nn.Module]) -> str:
    actual = type(module)
    if actual in types:
        return " has hooks, a forward or tensors of its own"
    return f" is a {actual.__module__}.{actual.__qualname__}, not a {types[-1].__name__}"


def post_norm_layer(layer: nn.Module, dtype: torch.dtype) -> PostNormLayer | str:
    """``layer`` for a packed call in ``dtype``; or what stands against it."""
    parts = _parts_as_built(layer)
    if isinstance(parts, str):
        return parts
    (
        _,
        attention,
        query,
        key,
        value,
        attention_dropout,
        _,
        attention_dense,
        hidden_dropout,
        attention_norm,
        intermediate,
        intermediate_dense,
        _,
        output_dense,
        output_dropout,
        output_norm,
    ) = parts
    if layer.is_decoder or attention.is_causal:
        return " is a decoder's"
    if (attention.training and attention_dropout.p > 0.0) or acts(hidden_dropout) or acts(output_dropout):
        return " is in training: dropout acts"
    linears = [
        (linear._parameters["weight"], linear._parameters["bias"])
        for linear in (query, key, value, attention_dense, intermediate_dense, output_dense)
    ]
    if any(weight.dtype != dtype or not weight.is_cpu for weight, _ in linears):
        return f" is not in {dtype} on the CPU, as its input"
    projections = linears[:3]
    if len({bias is None for _, bias in projections}) > 1:
        return ".attention.self has biases for some of its projections only"
    return PostNormLayer(
        num_heads=attention.num_attention_heads,
        scale=attention.scaling,
        qkv=prepare_linear(*projections),
        attention_output=prepare_linear(linears[3]),
        attention_norm=_norm(attention_norm),
        intermediate=prepare_linear(linears[4]),
        activation=_activation(intermediate.intermediate_act_fn),
        output=prepare_linear(linears[5]),
        output_norm=_norm(output_norm),
    )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm._parameters["weight"], norm._parameters["bias"], norm.eps)


def _activation(function: Any) -> Any:
    """The name by which ``functional.linear`` knows ``function``, else ``function``."""
    if is_as_built(function, GELUActivation) and function.act is F.gelu:
        return "gelu"
    return activation_name(function) or function


def linear_shapes(model: nn.Module) -> Iterator[LinearShape]:
    """Of the products that the packed path of the BERTs in ``model`` has."""
    for _, layer in named_modules(model, modeling_bert.BertLayer):
        parts = _parts_as_built(layer)
        if isinstance(parts, str):
            continue
        query, *_ = linears = [part for part in parts if isinstance(part, nn.Linear)]
        if not query.weight.is_cpu:
            continue
        yield LinearShape(query.weight.dtype, query.in_features, sum(linear.out_features for linear in linears[:3]))
        for linear in linears[3:]:
            yield LinearShape(linear.weight.dtype, linear.in_features, linear.out_features)


def encoder_obstacle(encoder: nn.Module) -> str | None:
    """What about its modules keeps ``encoder`` from the packed path at present."""
    for index, layer in enumerate(encoder.layer):
        parts = _parts_as_built(layer)
        if isinstance(parts, str):
            return f"layer.{index}{parts}"
    return None
