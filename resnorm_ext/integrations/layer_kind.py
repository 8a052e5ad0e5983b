# SPDX-License-Identifier: BSD-3-Clause
"""The Transformer layers of Hugging Face's models: what they are made of, and their weights, if they are as they were
built."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..build.extension import extension
from ..engine.encode import prepare_norm
from ..engine.linear import LinearShape, choose_backends, prepare_linear, product_dtype
from ..modules.eligibility import activation_name, products_under_autocast
from ..modules.originals import COMMON, Originals, forwards
from .replace import named_modules
from .transformers import is_as_built


@dataclass(frozen=True)
class LayerKind:
    """How a library's layer is made.

    Attributes:
        types: the classes that the layer may have.
        parts: the modules that it is made of, by name, and the classes that they may have. Those below are among them.
        head_dim: the attention's attribute from which its forward knows its heads.
        projections: those of queries, keys and values, or one for all three.
        split_size: the attention's attribute for how wide each of the three is in the output of one projection.
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
    head_dim: str
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
    split_size: str | None = None
    is_causal: bool = False

    @cached_property
    def originals(self) -> Originals:
        """What inference on a layer's weights stands for."""
        types = _originals_of(*self.types, *(each for types in self.parts.values() for each in types))
        library = sys.modules[self.eager_attention.__module__]
        places = [(library, name) for name in ("eager_attention_forward", "apply_chunking_to_forward")]
        places += [(GradientCheckpointingLayer, "__call__")]
        if self.chunked is not None:
            module, method = self.chunked
            places.append((_originals_of(*(self.parts[module] if module else self.types))[0], method))
        places = [(owner, name) for owner, name in places if hasattr(owner, name)]
        return COMMON + forwards(*types, GELUActivation, NewGELUActivation) + Originals(*places)

    @cached_property
    def names_read(self) -> frozenset[str]:
        """The names of arguments that a layer's forward, its attention's or an attention function does anything
        with."""
        around = [types for name, types in self.parts.items() if f"{self.attention}.".startswith(f"{name}.")]
        modules = _originals_of(*self.types, *(each for types in around for each in types))
        functions = [each.forward for each in modules] + [sdpa_attention_forward, self.eager_attention]
        return frozenset().union(*map(names_read_by, functions))

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


_GELU = F.gelu


def _originals_of(*types: type[nn.Module]) -> list[type[nn.Module]]:
    """Those of ``types`` that are not this package's."""
    package = __name__.partition(".")[0]
    return [each for each in types if each.__module__.partition(".")[0] != package]


def names_read_by(function: Callable) -> frozenset[str]:
    """The arguments by name that ``function`` takes, and every string in it, by which it may read others."""
    function = inspect.unwrap(function)
    parameters = inspect.signature(function).parameters.values()
    named = {each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
    return frozenset(named | _strings_of(function.__code__))


def _strings_of(code: CodeType) -> set[str]:
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            strings |= _strings_of(constant)
    return strings


class Precision(NamedTuple):
    """The dtypes of inference through layers.

    Attributes:
        weights: of the layers' parameters, and of what a call is given and returns.
        products: of what is multiplied.
        stream: of everything between: residual sums and norms.
    """

    weights: torch.dtype
    products: torch.dtype
    stream: torch.dtype


def precision_of(dtype: torch.dtype, shapes: list[LinearShape]) -> Precision:
    """For layers in ``dtype`` with products of these shapes, in the present autocast mode."""
    stream = product_dtype(shapes)
    autocast_dtype = products_under_autocast(dtype)
    if autocast_dtype is None:
        return Precision(dtype, stream, stream)
    shapes = [shape._replace(dtype=autocast_dtype) for shape in shapes]
    choose_backends(shapes)
    return Precision(dtype, product_dtype(shapes), stream)


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


def layer_weights(layer: nn.Module, kind: LayerKind, precision: Precision) -> extension.LayerWeights | str:
    """Those of ``layer`` for a call in ``precision``; or what stands against it."""
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
        norms = {name: _weight_and_bias(parts[name]) for name in kind.norms()}
    except KeyError as error:
        return f" has a {error} that is not a parameter"
    tensors = [tensor for pair in linears.values() for tensor in pair if tensor is not None]
    if any(tensor.dtype != precision.weights or not tensor.is_cpu for tensor in tensors):
        return f" is not in {precision.weights} on the CPU, as its input"
    out_dim = 1 if kind.linear is Conv1D else 0
    if any(bias is not None and bias.shape != (weight.size(out_dim),) for weight, bias in linears.values()):
        return " has a bias of another shape than its layer's"
    projections = [linears[name] for name in kind.projections]
    if len({bias is None for _, bias in projections}) > 1:
        return f".{kind.attention} has biases for some of its projections only"
    num_heads = _num_heads(attention, kind, [weight.size(out_dim) for weight, _ in projections])
    if num_heads is None:
        return f".{kind.attention} has projections that are not of whole heads alike"
    width = linears[kind.attention_output][0].size(out_dim)
    for name, parameters in norms.items():
        if tuple(parts[name].normalized_shape) != (width,):
            return f".{name} is not over the layer's width"
        if any(each is not None and each.dtype not in (precision.weights, torch.float32) for each in parameters):
            return f".{name} is in another dtype than the layer"
    prepared_norms = {
        name: prepare_norm(*parameters, parts[name].eps, precision.stream) for name, parameters in norms.items()
    }
    prepare = partial(prepare_linear, transposed=kind.linear is Conv1D, dtype=precision.products)
    return extension.LayerWeights(
        num_heads=num_heads,
        scale=attention.scaling,
        qkv=prepare(*projections),
        attention_output=prepare(linears[kind.attention_output]),
        attention_norm=prepared_norms[kind.attention_norm],
        intermediate=prepare(linears[kind.intermediate]),
        activation=kind.activation_of(parts),
        output=prepare(linears[kind.output]),
        feed_forward_norm=prepared_norms[kind.feed_forward_norm],
    )


def _num_heads(attention: nn.Module, kind: LayerKind, out_features: list[int]) -> int | None:
    """How many heads the projections, so wide, have by what the attention's forward reads: some may have been pruned
    away."""
    head_dim = getattr(attention, kind.head_dim)
    width = sum(out_features) // 3
    expected = [width] * 3 if kind.split_size is None else [3 * getattr(attention, kind.split_size)]
    return width // head_dim if out_features == expected and width > 0 and width % head_dim == 0 else None


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Raises KeyError where they are not parameters. nn.Module's attributes cost more than all else here."""
    return module._parameters["weight"], module._parameters["bias"]


def _activation_name(function: Any) -> str | None:
    """The name by which ``functional.linear`` knows ``function``."""
    if is_as_built(function, GELUActivation) and function.act in (_GELU, function._gelu_python):
        return "gelu"
    if is_as_built(function, NewGELUActivation):
        return "gelu_tanh"
    return activation_name(function)


def linear_shapes(model: nn.Module, kind: LayerKind) -> Iterator[LinearShape]:
    """Of the products that inference through the layers in ``model`` has."""
    for _, layer in named_modules(model, kind.types[0]):
        yield from layer_shapes(layer, kind)


def layer_shapes(layer: nn.Module, kind: LayerKind) -> Iterator[LinearShape]:
    """Of the products of a ``layer`` on the CPU, if it is as it was built."""
    parts = parts_as_built(layer, kind)
    if isinstance(parts, str):
        return
    for names in (kind.projections, *([name] for name in kind.denses())):
        weights = [parts[name].weight for name in names]
        sizes = [weight.shape[:: -1 if kind.linear is Conv1D else 1] for weight in weights]
        if weights[0].is_cpu:
            yield LinearShape(weights[0].dtype, sizes[0][1], sum(out_features for out_features, _ in sizes))
