# SPDX-License-Identifier: BSD-3-Clause
"""The weights of layers as inference reads them, kept until anything about the layers changes: looking at some hundred
modules at every call costs more than a short sentence's arithmetic, comparing what they hold does not. What has been
replaced since goes at the next call that asks, with ``refresh`` or with the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..build.extension import extension
from ..engine.linear import LinearShape
from ..engine.weights import WeightState
from ..modules.eligibility import autocasts, grad_reason
from ..modules.linear import PREPARED, Prepared
from .layer_kind import LayerKind, Precision, layer_shapes, layer_weights, parts_as_built, precision_of


class PreparedLayers(Prepared):
    """Layers' weights and what they were made from.

    Attributes:
        layers: their weights.
        precision: in which they are.
        configs: those that the layers' attention reads.
    """

    __slots__ = ("_autocast", "_backends", "_modules", "_state", "_weights", "configs", "layers", "precision")

    def __init__(
        self, owner: nn.Module, layers: Sequence[nn.Module], kind: LayerKind, dtype: torch.dtype, name: str
    ) -> None:
        """Raises ValueError where the layers cannot be prepared, which says why."""
        # What changes from here on, by another thread, is found changed at the next call.
        _, *modules = owner.modules()
        self._modules = tuple(modules)
        self._state = extension.module_state((owner, *modules), Prepared)
        self._weights = WeightState(tensor for layer in layers for tensor in _tensors(layer, kind))
        self._autocast = autocasts()
        shapes = [shape for layer in layers for shape in layer_shapes(layer, kind)]
        self.precision = precision_of(dtype, shapes) if shapes else Precision(dtype, dtype, dtype)
        self.layers: list[extension.LayerWeights] = []
        for index, layer in enumerate(layers):
            weights = layer_weights(layer, kind, self.precision)
            if isinstance(weights, str):
                raise ValueError(f"{name.format(index)}{weights}")
            self.layers.append(weights)
        configs = [layer.get_submodule(kind.attention).config for layer in layers]
        self.configs: list[PreTrainedConfig] = list({id(config): config for config in configs}.values())
        products = [shape._replace(dtype=self.precision.products) for shape in dict.fromkeys(shapes)]
        self._backends: dict[LinearShape, str] = {shape: extension.linear_backend(*shape) for shape in products}

    def is_current(self, owner: nn.Module, dtype: torch.dtype) -> bool:
        return (
            self.precision.weights == dtype
            and self._autocast == autocasts()
            and extension.has_module_state((owner, *self._modules), self._state, Prepared)
            and self._weights.is_current()
            and all(extension.linear_backend(*shape) == backend for shape, backend in self._backends.items())
        )

    def tokens_of(self, x: Tensor) -> Tensor:
        """``x``, ``(batch, length, dim)``, as the engine takes it: ``(tokens, dim)``, in the stream's dtype."""
        return x.resolve_neg().flatten(0, 1).to(self.precision.stream)

    def requires_grad(self) -> bool:
        return self._weights.requires_grad()

    def is_watchable(self) -> bool:
        return self._weights.is_watchable()


def prepared_layers(
    owner: nn.Module,
    layers: Sequence[nn.Module],
    kind: LayerKind,
    x: Tensor,
    dtype: torch.dtype,
    name: str = "layer.{}",
) -> PreparedLayers | str:
    """The weights of ``layers`` for a call that comes from ``x``, on an input of ``dtype``; or what stands against it:
    that a gradient may be wanted, or ``name``, with the layer's index, and why.

    ``owner`` is the module that keeps them, and that holds ``layers`` or is the only one of them.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *_first(layers))):
        return grad_reason(owner, x)
    prepared = owner.__dict__.get(PREPARED)
    if not isinstance(prepared, PreparedLayers) or not prepared.is_current(owner, dtype):
        owner.__dict__.pop(PREPARED, None)
        reason = grad_reason(owner)
        if reason is not None:
            return reason
        try:
            prepared = PreparedLayers(owner, layers, kind, dtype, name)
        except ValueError as error:
            return str(error)
        if prepared.is_watchable():
            owner.__dict__[PREPARED] = prepared
    elif torch.is_grad_enabled() and prepared.requires_grad():
        return grad_reason(owner)
    return prepared


def _first(layers: Sequence[nn.Module]) -> list[Tensor]:
    """A parameter of the first layer, in most cases: in training it tells at no cost that the call is recorded."""
    for layer in layers:
        for parameter in layer.parameters():
            return [parameter]
    return []


def _tensors(layer: nn.Module, kind: LayerKind) -> list[Tensor]:
    """Those that a layer's weights were made of."""
    parts = parts_as_built(layer, kind)
    if isinstance(parts, str):
        return []
    modules = [parts[name] for name in (*kind.projections, *kind.denses(), *kind.norms())]
    return [tensor for module in modules for tensor in module._parameters.values() if tensor is not None]
