# SPDX-License-Identifier: BSD-3-Clause
"""The Transformer layers of Hugging Face's models: what they are made of, and their weights, if they are as they were
built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from .._extension import extension
from ..engine.linear import LinearShape, prepare_linear
from ..modules.eligibility import activation_name
from .replace import named_modules
from .transformers import is_as_built


@dataclass(frozen=True)
class LayerKind:
    """How a library's layer is made.

    Attributes:
        types: the classes that the layer may have.
        parts: the modules that it is made of, by name, and the classes that they may have. Those below are among them.
        num_heads: the attention's attribute.
        projections: those of queries, keys and values, or one for all three.
        attention_dropout: the module and the attribute of it that holds the rate.
        activation: the module and the attribute of it that holds the function.
        dropouts: those on what is added to the residual.
        chunked: the module and the method of it that the feed-forward runs by, which an instance may have its own of.
        linear: the class of the linear layers.
        is_causal: whether the attention is.
    """

    types: tuple[type[nn.Module], ...]
    parts: dict[str, tuple[type[nn.Module], ...]]
    attention: str
    num_heads: str
    projections: tuple[str, ...]
    attention_dropout: tuple[str, str]
    attention_output: str
    attention_norm: str
    intermediate: str
    activation: tuple[str, str]
    output: str
    feed_forward_norm: str
    dropouts: tuple[str, ...]
    eager_attention: Callable
    chunked: tuple[str, str] | None = None
    linear: type[nn.Linear] | type[Conv1D] = nn.Linear
    is_causal: bool = False

    def activation_of(self, parts: dict[str, nn.Module]) -> str | None:
        return _activation_name(_value(parts, self.activation))

    def drops(self, parts: dict[str, nn.Module]) -> bool:
        """Whether a dropout drops anything."""
        attention = parts[self.attention]
        in_attention = attention.training and _value(parts, self.attention_dropout) > 0.0
        return in_attention or any(acts(parts[name]) for name in self.dropouts)

    def denses(self) -> tuple[str, str, str]:
        return self.attention_output, self.intermediate, self.output

    def norms(self) -> tuple[str, str]:
        return self.attention_norm, self.feed_forward_norm


def _value(parts: dict[str, nn.Module], place: tuple[str, str]) -> Any:
    module, attribute = place
    return getattr(parts[module], attribute)


def acts(dropout: nn.Dropout) -> bool:
    """Whether ``dropout`` drops anything."""
    return dropout.training and dropout.p > 0.0


def parts_as_built(layer: nn.Module, kind: LayerKind) -> dict[str, nn.Module] | str:
    """The parts of ``layer``; or the name of what is not as it was built, and why."""
    if not is_as_built(layer, *kind.types):
        return _not_as_built(layer, *kind.types)
    parts = {"": layer}
    for name, types in kind.parts.items():
        parent, _, child = name.rpartition(".")
        part = parts[parent]._modules.get(child)
        if not is_as_built(part, *types):
            return f".{name}{_not_as_built(part, *types)}"
        parts[name] = part
    if kind.chunked is not None:
        module, method = kind.chunked
        if method in parts[module].__dict__:
            return f"{module and '.'}{module} has a {method} of its own"
    if kind.activation_of(parts) is None:
        return f".{'.'.join(kind.activation)} is neither ReLU nor GELU, or has hooks"
    return parts


def _not_as_built(module: nn.Module | None, *types: type[nn.Module]) -> str:
    actual = type(module)
    if actual in types:
        return " has hooks, a forward or tensors of its own"
    return f" is a {actual.__module__}.{actual.__qualname__}, not a {types[-1].__name__}"


def layer_weights(layer: nn.Module, kind: LayerKind, dtype: torch.dtype) -> extension.LayerWeights | str:
    """Those of ``layer`` for a call in ``dtype``; or what stands against it."""
    parts = parts_as_built(layer, kind)
    if isinstance(parts, str):
        return parts
    attention = parts[kind.attention]
    if getattr(layer, "is_decoder", False) or attention.is_causal != kind.is_causal:
        return f" is {'not ' if kind.is_causal else ''}a decoder's"
    if kind.drops(parts):
        return " is in training: dropout acts"
    try:
        linears = {name: _weight_and_bias(parts[name]) for name in (*kind.projections, *kind.denses())}
        norms = {
            name: extension.Norm(*_detached(*_weight_and_bias(parts[name])), parts[name].eps) for name in kind.norms()
        }
    except KeyError as error:
        return f" has a {error} that is not a parameter"
    if any(
        tensor.dtype != dtype or not tensor.is_cpu for pair in linears.values() for tensor in pair if tensor is not None
    ):
        return f" is not in {dtype} on the CPU, as its input"
    out_dim = 1 if kind.linear is Conv1D else 0
    if any(bias is not None and bias.shape != (weight.size(out_dim),) for weight, bias in linears.values()):
        return " has a bias of another shape than its layer's"
    projections = [linears[name] for name in kind.projections]
    if len({bias is None for _, bias in projections}) > 1:
        return f".{kind.attention} has biases for some of its projections only"
    prepare = partial(prepare_linear, transposed=kind.linear is Conv1D)
    return extension.LayerWeights(
        num_heads=getattr(attention, kind.num_heads),
        scale=attention.scaling,
        qkv=prepare(*projections),
        attention_output=prepare(linears[kind.attention_output]),
        attention_norm=norms[kind.attention_norm],
        intermediate=prepare(linears[kind.intermediate]),
        activation=kind.activation_of(parts),
        output=prepare(linears[kind.output]),
        feed_forward_norm=norms[kind.feed_forward_norm],
    )


def _detached(*parameters: Tensor | None) -> Iterator[Tensor | None]:
    """Parameters that are held where the garbage collector does not look would never go."""
    return (None if parameter is None else parameter.detach() for parameter in parameters)


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


def linear_shapes(model: nn.Module, kind: LayerKind) -> Iterator[LinearShape]:
    """Of the products that inference through the layers in ``model`` has."""
    for _, layer in named_modules(model, kind.types[0]):
        if not isinstance(parts_as_built(layer, kind), str):
            yield from layer_shapes(layer, kind)


def layer_shapes(layer: nn.Module, kind: LayerKind) -> Iterator[LinearShape]:
    """Of the products of a ``layer`` as it was built, on the CPU."""
    parts = parts_as_built(layer, kind)
    for names in (kind.projections, *([name] for name in kind.denses())):
        weights = [parts[name].weight for name in names]
        sizes = [weight.shape[:: -1 if kind.linear is Conv1D else 1] for weight in weights]
        if weights[0].is_cpu:
            yield LinearShape(weights[0].dtype, sizes[0][1], sum(out_features for out_features, _ in sizes))
