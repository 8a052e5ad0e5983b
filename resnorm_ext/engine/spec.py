# SPDX-License-Identifier: BSD-3-Clause
"""What a library's Transformer layer is made of, and what inference reads of one that is as it was built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules.eligibility import activation_name, is_plain
from ..modules.norm import LayerNorm
from .linear import LinearShape


class Dropouts(NamedTuple):
    """Where the rates of a layer's dropouts are, as pairs of module and attribute; None where there is none. Each acts
    in the training mode of that module.

    Attributes:
        attention_weights: in the training mode of ``attention``, which applies it.
        attention_update, update: before the two residual adds.
        activation: within the feed-forward.
    """

    attention_weights: tuple[str, str]
    attention_update: tuple[str, str] | None = None
    activation: tuple[str, str] | None = None
    update: tuple[str, str] | None = None


@dataclass(frozen=True)
class LayerSpec:
    """How a library's layer is made.

    Modules go by their names within the layer, ``""`` being itself; what they hold by a pair of module and attribute; a
    linear layer's parameters by what their names begin with, before ``weight`` and ``bias``.

    Attributes:
        types: the classes that the layer may have; none where whoever has the layer knows it.
        parts: the modules that it is made of, by name, and the classes that they may have; of those below, only such as
            are not what they are as a rule.
        attention: the module whose ``head_dim`` is the width of a head.
        head_dim: that attribute's name.
        scaling: the attention's attribute that its scores are multiplied by; where None, ``head_dim ** -0.5``.
        projections: linear layers of queries, keys and values, or one of all three.
        split_size: the attention's attribute for how wide each of the three is in the output of one projection.
        attention_output, intermediate, output: linear layers.
        attention_norm, feed_forward_norm: after the residual add of a post-norm layer, before the block of a pre-norm
            one.
        activation: the feed-forward's.
        dropouts: where their rates are.
        methods: those that the layer runs by, of which a module may have its own.
        norm_first: whether layers are pre-norm; where None, their attribute of that name says.
        linear: the class of the linear layers.
        transposed: whether their weights are ``(in_features, out_features)``.
        is_causal: whether the attention is.
        all_parts: ``parts`` with the linear layers, norms and dropouts that it does not name.
    """

    types: tuple[type[nn.Module], ...]
    parts: dict[str, tuple[type[nn.Module], ...]]
    attention: str
    projections: tuple[str, ...]
    attention_output: str
    attention_norm: str
    intermediate: str
    activation: tuple[str, str]
    output: str
    feed_forward_norm: str
    dropouts: Dropouts
    head_dim: str = "head_dim"
    scaling: str | None = "scaling"
    split_size: str | None = None
    methods: tuple[tuple[str, str], ...] = ()
    norm_first: bool | None = False
    linear: type[nn.Module] = nn.Linear
    transposed: bool = False
    is_causal: bool = False
    all_parts: dict[str, tuple[type[nn.Module], ...]] = field(init=False)

    def __post_init__(self) -> None:
        linears = {prefix[:-1]: (self.linear,) for prefix in self.linears() if prefix.endswith(".")}
        norms = dict.fromkeys(self.norms(), (LayerNorm, nn.LayerNorm))
        dropouts = {name: (nn.Dropout,) for name, rate in self.dropout_places() if rate == "p"}
        object.__setattr__(self, "all_parts", linears | norms | dropouts | self.parts)

    def is_as_built(self, module: nn.Module | None, *types: type[nn.Module]) -> bool:
        return is_plain(module, *types)

    def activation_name(self, function: Any) -> str | None:
        """The name by which operators know ``function``."""
        return activation_name(function)

    def linears(self) -> tuple[str, ...]:
        return (*self.projections, self.attention_output, self.intermediate, self.output)

    def norms(self) -> tuple[str, str]:
        return self.attention_norm, self.feed_forward_norm

    def dropout_places(self) -> list[tuple[str, str]]:
        return [place for place in self.dropouts if place is not None]

    def dropout_rate(self, layer: nn.Module, place: tuple[str, str] | None) -> float:
        """At which the dropout there acts now; 0 where there is none."""
        if place is None:
            return 0.0
        trains = module_at(layer, place[0]).training
        if place == self.dropouts.attention_weights:  # some attentions ask their dropout, too
            trains = trains or module_at(layer, self.attention).training
        return _value(layer, place) if trains else 0.0

    def reason(self, layer: nn.Module, *, is_linear: Callable[[nn.Module], bool] | None = None) -> str | None:
        """What of ``layer`` is not as it was built, as an end of a sentence about it; None where all is. Of its linear
        layers it is enough that ``is_linear`` says that they are."""
        if self.types and not self.is_as_built(layer, *self.types):
            return _not_as_built(layer, *self.types)
        for name, types in self.all_parts.items():
            part = module_at(layer, name)
            if is_linear is not None and part is not None and f"{name}." in self.linears() and is_linear(part):
                continue
            if not self.is_as_built(part, *types):
                return f".{name}{_not_as_built(part, *types)}"
        for name, method in self.methods:
            if method in module_at(layer, name).__dict__:
                return f"{name and '.'}{name} has a {method} of its own"
        return None

    def lasting_reason(self, layer: nn.Module, *, is_linear: Callable[[nn.Module], bool] | None = None) -> str | None:
        """What keeps ``layer`` from the engine whatever the call: ``reason``, or that the engine cannot do it."""
        reason = self.reason(layer, is_linear=is_linear)
        if reason is not None:
            return reason
        if self.activation_name(_value(layer, self.activation)) is None:
            return f".{'.'.join(filter(None, self.activation))} is neither ReLU nor GELU, or has hooks"
        attention = module_at(layer, self.attention)
        if getattr(layer, "is_decoder", False) or getattr(attention, "is_causal", self.is_causal) != self.is_causal:
            return f" is {'not ' if self.is_causal else ''}a decoder's"
        return None

    def reason_in_inference(self, layer: nn.Module, dtype: torch.dtype) -> str | None:
        """What keeps a ``layer`` that is as it was built from inference on an input of ``dtype``."""
        if any(self.dropout_rate(layer, place) > 0.0 for place in self.dropout_places()):
            return " is in training: dropout acts"
        try:
            linears = [_weight_and_bias(layer, prefix) for prefix in self.linears()]
            norms = {name: _weight_and_bias(layer, f"{name}.") for name in self.norms()}
        except KeyError as error:
            return f" has a {error} that is not a parameter"
        tensors = [tensor for pair in linears for tensor in pair if tensor is not None]
        if any(tensor.dtype != dtype for tensor in tensors):
            return f" is not in {dtype}, as its input"
        out_dim = 1 if self.transposed else 0
        if any(bias is not None and bias.shape != (weight.size(out_dim),) for weight, bias in linears):
            return " has a bias of another shape than its layer's"
        projections, (output_weight, _) = linears[: len(self.projections)], linears[len(self.projections)]
        if len({bias is None for _, bias in projections}) > 1:
            return f".{self.attention} has biases for some of its projections only"
        if not self._has_whole_heads(layer, [weight.size(out_dim) for weight, _ in projections]):
            return f".{self.attention} has projections that are not of whole heads alike"
        for name, parameters in norms.items():
            if tuple(module_at(layer, name).normalized_shape) != (output_weight.size(out_dim),):
                return f".{name} is not over the layer's width"
            if any(each is not None and each.dtype not in (dtype, torch.float32) for each in parameters):
                return f".{name} is in another dtype than the layer"
        return None

    def _has_whole_heads(self, layer: nn.Module, out_features: list[int]) -> bool:
        """Whether projections so wide are of as many queries, keys and values, whose heads are as wide as the
        attention's forward reads; some may have been pruned away."""
        attention = module_at(layer, self.attention)
        width = sum(out_features) // 3
        expected = [width] * 3 if len(out_features) == 3 else [3 * width]
        is_split_so = self.split_size is None or getattr(attention, self.split_size) == width
        return is_split_so and out_features == expected and width > 0 and width % getattr(attention, self.head_dim) == 0

    def parameters(self, layer: nn.Module) -> list[Tensor | None]:
        """Those of a ``layer`` that is as it was built, in the order in which a post-norm layer computes."""
        attention, feed_forward = (*self.projections, self.attention_output), (self.intermediate, self.output)
        names = (*attention, f"{self.attention_norm}.", *feed_forward, f"{self.feed_forward_norm}.")
        return [tensor for name in names for tensor in _weight_and_bias(layer, name)]

    def options(self, layer: nn.Module) -> LayerOptions:
        """What a ``layer`` that is as it was built is beside its parameters."""
        attention = module_at(layer, self.attention)
        head_dim = int(getattr(attention, self.head_dim))  # numbers may be numpy's
        return LayerOptions(
            head_dim,
            head_dim**-0.5 if self.scaling is None else float(getattr(attention, self.scaling)),
            float(module_at(layer, self.attention_norm).eps),
            float(module_at(layer, self.feed_forward_norm).eps),
            self.activation_name(_value(layer, self.activation)),
            bool(layer.norm_first if self.norm_first is None else self.norm_first),
        )

    def common_options(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> LayerOptions | None:
        """Those of all ``layers``, for inference on an input of ``dtype`` by one operator; None where something stands
        against that, or they differ."""
        for layer in layers:
            if self.lasting_reason(layer) is not None or self.reason_in_inference(layer, dtype) is not None:
                return None
        first, *others = map(self.options, layers)
        one_eps = first.attention_eps == first.feed_forward_eps
        return first if one_eps and all(each == first for each in others) and not self.transposed else None

    def traced_values(self, layers: Sequence[nn.Module]) -> tuple[bool | str, ...]:
        """What may change in ``layers``, which need not be as they were built, beside their parts and parameters: read
        where torch.compile sees it, so that it traces the call again when it finds another value. Numbers by their
        digits: it makes variables of those."""
        values: list[bool | str] = []
        for layer in layers:
            names = (self.attention, *(name for name, _ in self.dropout_places()))
            values += [getattr(module_at(layer, name), "training", False) for name in names]
            numbers = [getattr(module_at(layer, name), rate, 0.0) for name, rate in self.dropout_places()]
            numbers += [getattr(module_at(layer, name), "eps", 0.0) for name in self.norms()]
            if self.scaling is not None:
                numbers.append(getattr(module_at(layer, self.attention), self.scaling, 0.0))
            values += [float(number).hex() for number in numbers]
            if self.norm_first is None:
                values.append(bool(layer.norm_first))
            name, attribute = self.activation
            activation = getattr(module_at(layer, name), attribute, None)
            is_function = isinstance(activation, FunctionType | BuiltinFunctionType)
            values.append(activation.__name__ if is_function else type(activation).__name__)
        return tuple(values)

    def shapes(self, layer: nn.Module) -> list[LinearShape]:
        """Of the products that a ``layer`` has."""
        groups = (self.projections, *((name,) for name in self.linears()[len(self.projections) :]))
        shapes = []
        for group in groups:
            weights = [_weight_and_bias(layer, prefix)[0] for prefix in group]
            sizes = [weight.shape[::-1] if self.transposed else weight.shape for weight in weights]
            shapes.append(LinearShape(weights[0].dtype, sizes[0][1], sum(out_features for out_features, _ in sizes)))
        return shapes


class LayerOptions(NamedTuple):
    """What a layer is beside its parameters, as ``extension.prepare_layer`` takes it, and whether it is pre-norm."""

    head_dim: int
    scale: float
    attention_eps: float
    feed_forward_eps: float
    activation: str
    norm_first: bool


def module_at(layer: nn.Module, name: str) -> nn.Module | None:
    """The module of that name in ``layer``. nn.Module's attributes cost more than all else here."""
    module = layer
    for child in name.split(".") if name else ():
        module = module._modules.get(child) if module is not None else None
    return module


def _value(layer: nn.Module, place: tuple[str, str]) -> Any:
    name, attribute = place
    return getattr(module_at(layer, name), attribute)


def _weight_and_bias(layer: nn.Module, prefix: str) -> tuple[Tensor, Tensor | None]:
    """Raises KeyError where they are not parameters."""
    name, _, start = prefix.rpartition(".")
    parameters = module_at(layer, name)._parameters
    return parameters[f"{start}weight"], parameters[f"{start}bias"]


def _not_as_built(module: nn.Module | None, *types: type[nn.Module]) -> str:
    actual = type(module)
    if actual in types:
        return " has hooks, a forward or tensors of its own"
    return f" is a {actual.__module__}.{actual.__qualname__}, not a {types[-1].__name__}"
