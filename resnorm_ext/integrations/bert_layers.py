# SPDX-License-Identifier: BSD-3-Clause
"""The layers of Hugging Face's BERT and its like: their blocks with residual add and norm fused, and their weights for
the packed path, if they are as they were built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation

from .. import functional
from ..engine.linear import LinearShape, prepare_linear
from ..engine.post_norm import Norm, PostNormLayer
from ..modules import LayerNorm
from ..modules.eligibility import activation_name, has_global_hooks
from .replace import named_modules
from .transformers import is_as_built

NORMS = (LayerNorm, nn.LayerNorm)


_PARTS = {  # either a role in Classes or the types
    "attention": "attention",
    "attention.self": "self_attention",
    "attention.self.query": (nn.Linear,),
    "attention.self.key": (nn.Linear,),
    "attention.self.value": (nn.Linear,),
    "attention.self.dropout": (nn.Dropout,),
    "attention.output": "self_output",
    "attention.output.dense": (nn.Linear,),
    "attention.output.dropout": (nn.Dropout,),
    "attention.output.LayerNorm": NORMS,
    "intermediate": "intermediate",
    "intermediate.dense": (nn.Linear,),
    "output": "output",
    "output.dense": (nn.Linear,),
    "output.dropout": (nn.Dropout,),
    "output.LayerNorm": NORMS,
}
_PATHS = {name: name.split(".") for name in _PARTS}


@dataclass(frozen=True)
class Classes:
    """The classes of a model that is built like BERT, by their roles, and what takes the place of some."""

    model: type[nn.Module]
    embeddings: type[nn.Module]
    encoder: type[nn.Module]
    layer: type[nn.Module]
    attention: type[nn.Module]
    self_attention: type[nn.Module]
    cross_attention: type[nn.Module]
    self_output: type[nn.Module]
    intermediate: type[nn.Module]
    output: type[nn.Module]
    eager_attention: Callable
    replacements: dict[type[nn.Module], type[nn.Module]] = field(default_factory=dict)

    @classmethod
    def of(cls, library: ModuleType, prefix: str) -> Classes:
        """Those of a module of transformers, whose names begin with ``prefix``."""
        roles = [role for role in cls.__dataclass_fields__ if role not in ("eager_attention", "replacements")]
        named = {role: getattr(library, prefix + role.title().replace("_", "")) for role in roles}
        return cls(**named, eager_attention=library.eager_attention_forward)

    @cached_property
    def parts(self) -> dict[str, tuple[type[nn.Module], ...]]:
        """The modules that a layer is made of, by name, and the classes that they may have."""
        return {name: self._types(kind) if isinstance(kind, str) else kind for name, kind in _PARTS.items()}

    def _types(self, role: str) -> tuple[type[nn.Module], ...]:
        original = getattr(self, role)
        return self.either(role) if original in self.replacements else (original,)

    def replacement(self, role: str) -> type[nn.Module]:
        return self.replacements[getattr(self, role)]

    def either(self, role: str) -> tuple[type[nn.Module], type[nn.Module]]:
        """The class itself and what takes its place."""
        return getattr(self, role), self.replacement(role)


class FusedOutput(nn.Module):
    """Dropout, residual add and layer norm in one pass."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return _dropout_add_norm(self, self.dense(hidden_states), input_tensor)


def _dropout_add_norm(block: FusedOutput, update: Tensor, residual: Tensor) -> Tensor:
    dropout, norm = block.dropout, block.LayerNorm
    fuses = (
        not has_global_hooks()
        and is_as_built(dropout, nn.Dropout)
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


_PROJECTIONS = ("attention.self.query", "attention.self.key", "attention.self.value")
_DENSES = ("attention.output.dense", "intermediate.dense", "output.dense")


def _parts_as_built(layer: nn.Module, classes: Classes) -> dict[str, nn.Module] | str:
    """The modules of ``layer`` that ``_PARTS`` names; or the name of what is not as it was built, and why."""
    if not is_as_built(layer, classes.layer) or "feed_forward_chunk" in layer.__dict__:
        return _not_as_built(layer, classes.layer)
    parts = {}
    for name, types in classes.parts.items():
        part: nn.Module | None = layer
        for child in _PATHS[name]:
            part = part._modules.get(child)
        if not is_as_built(part, *types):
            return f".{name}{_not_as_built(part, *types)}"
        parts[name] = part
    if _activation_name(parts["intermediate"].intermediate_act_fn) is None:
        return ".intermediate.intermediate_act_fn is neither ReLU nor GELU, or has hooks"
    return parts


def _not_as_built(module: nn.Module | None, *types: type[nn.Module]) -> str:
    actual = type(module)
    if actual in types:
        return " has hooks, a forward or tensors of its own"
    return f" is a {actual.__module__}.{actual.__qualname__}, not a {types[-1].__name__}"


def post_norm_layer(layer: nn.Module, classes: Classes, dtype: torch.dtype) -> PostNormLayer | str:
    """``layer`` for a packed call in ``dtype``; or what stands against it."""
    parts = _parts_as_built(layer, classes)
    if isinstance(parts, str):
        return parts
    attention = parts["attention.self"]
    if layer.is_decoder or attention.is_causal:
        return " is a decoder's"
    attention_drops = attention.training and parts["attention.self.dropout"].p > 0.0
    if attention_drops or acts(parts["attention.output.dropout"]) or acts(parts["output.dropout"]):
        return " is in training: dropout acts"
    try:
        linears = {name: _weight_and_bias(parts[name]) for name in (*_PROJECTIONS, *_DENSES)}
        norms = {
            name: Norm(*_weight_and_bias(parts[name]), parts[name].eps)
            for name in ("attention.output.LayerNorm", "output.LayerNorm")
        }
    except KeyError as error:
        return f" has a {error} that is not a parameter"
    if any(weight.dtype != dtype or not weight.is_cpu for weight, _ in linears.values()):
        return f" is not in {dtype} on the CPU, as its input"
    projections = [linears[name] for name in _PROJECTIONS]
    if len({bias is None for _, bias in projections}) > 1:
        return ".attention.self has biases for some of its projections only"
    return PostNormLayer(
        num_heads=attention.num_attention_heads,
        scale=attention.scaling,
        qkv=prepare_linear(*projections),
        attention_output=prepare_linear(linears["attention.output.dense"]),
        attention_norm=norms["attention.output.LayerNorm"],
        intermediate=prepare_linear(linears["intermediate.dense"]),
        activation=_activation_name(parts["intermediate"].intermediate_act_fn),
        output=prepare_linear(linears["output.dense"]),
        output_norm=norms["output.LayerNorm"],
    )


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Raises KeyError where they are not parameters. nn.Module's attributes cost more than all else here."""
    return module._parameters["weight"], module._parameters["bias"]


def _activation_name(function: Any) -> str | None:
    """The name by which ``functional.linear`` knows ``function``."""
    if is_as_built(function, GELUActivation) and function.act in (F.gelu, function._gelu_python):
        return "gelu"
    if is_as_built(function, NewGELUActivation):
        return "gelu_tanh"
    return activation_name(function)


def linear_shapes(model: nn.Module, classes: Classes) -> Iterator[LinearShape]:
    """Of the products that the packed path of the models in ``model`` has."""
    for _, layer in named_modules(model, classes.layer):
        parts = _parts_as_built(layer, classes)
        if isinstance(parts, str):
            continue
        query, *_ = projections = [parts[name] for name in _PROJECTIONS]
        if not query.weight.is_cpu:
            continue
        yield LinearShape(query.weight.dtype, query.in_features, sum(linear.out_features for linear in projections))
        for linear in (parts[name] for name in _DENSES):
            yield LinearShape(linear.weight.dtype, linear.in_features, linear.out_features)


def encoder_obstacle(encoder: nn.Module, classes: Classes) -> str | None:
    """What about its modules keeps ``encoder`` from the packed path at present."""
    for index, layer in enumerate(encoder.layer):
        parts = _parts_as_built(layer, classes)
        if isinstance(parts, str):
            return f"layer.{index}{parts}"
    return None
