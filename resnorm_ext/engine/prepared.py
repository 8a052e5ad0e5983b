# SPDX-License-Identifier: BSD-3-Clause
"""The weights of layers as inference reads them, kept until anything about the layers changes: looking at some hundred
modules at every call costs more than a short sentence's arithmetic, comparing what they hold does not. What has been
replaced since goes at the next call that asks, with ``refresh`` or with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..build.extension import extension
from ..modules.eligibility import autocasts, grad_reason, products_under_autocast
from .encode import encode
from .linear import LinearShape, choose_backends, product_dtype
from .spec import LayerSpec, module_at
from .weights import WeightState

# On a module: what inference has made of its weights.
PREPARED = "_resnorm_prepared"


class Prepared:
    """What a module keeps under ``PREPARED``. A copy or a pickle of it is None."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


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


def _precision_of(dtype: torch.dtype, shapes: list[LinearShape]) -> Precision:
    """For layers in ``dtype`` with products of these shapes, in the present autocast mode."""
    if not shapes:
        return Precision(dtype, dtype, dtype)
    choose_backends(shapes)
    stream = product_dtype(shapes)
    autocast_dtype = products_under_autocast(dtype)
    if autocast_dtype is None:
        return Precision(dtype, stream, stream)
    shapes = [shape._replace(dtype=autocast_dtype) for shape in shapes]
    choose_backends(shapes)
    return Precision(dtype, product_dtype(shapes), stream)


class PreparedLayers(Prepared):
    """Layers' weights and what they were made from.

    Attributes:
        layers: their weights.
        norm_first: whether they are pre-norm layers; None where some are.
        precision: in which they are.
        configs: those that the layers' attention reads, where they have some.
    """

    __slots__ = (
        "_autocast",
        "_backends",
        "_modules",
        "_state",
        "_weights",
        "configs",
        "layers",
        "norm_first",
        "precision",
    )

    def __init__(
        self, owner: nn.Module, layers: Sequence[nn.Module], spec: LayerSpec, dtype: torch.dtype, name: str
    ) -> None:
        """Raises ValueError where the layers cannot be prepared, which says why."""
        # What changes from here on, by another thread, is found changed at the next call.
        _, *modules = owner.modules()
        self._modules = tuple(modules)
        self._state = extension.module_state((owner, *modules), Prepared)
        for index, layer in enumerate(layers):
            reason = spec.lasting_reason(layer) or spec.reason_in_inference(layer, dtype)
            if reason is not None:
                raise ValueError(f"{name.format(index)}{reason}")
        parameters = [spec.parameters(layer) for layer in layers]
        tensors = [tensor for each in parameters for tensor in each if tensor is not None]
        if not all(tensor.is_cpu for tensor in tensors):
            raise ValueError("the layers are not on the CPU, as their input is")
        self._weights = WeightState(tensors)
        self._autocast = autocasts()
        shapes = [shape for layer in layers for shape in spec.shapes(layer)]
        self.precision = _precision_of(dtype, shapes)
        options = [spec.options(layer) for layer in layers]
        dtypes = {"products": self.precision.products, "stream": self.precision.stream}
        self.layers: list[extension.LayerWeights] = [
            extension.prepare_layer(each, *option[:-1], transposed=spec.transposed, **dtypes)
            for each, option in zip(parameters, options, strict=True)
        ]
        orders = {option.norm_first for option in options}
        self.norm_first = orders.pop() if len(orders) == 1 else None
        configs = [getattr(module_at(layer, spec.attention), "config", None) for layer in layers]
        self.configs: list[Any] = list({id(config): config for config in configs}.values())
        products = [shape._replace(dtype=self.precision.products) for shape in dict.fromkeys(shapes)]
        self._backends: dict[LinearShape, str] = {shape: extension.linear_backend(*shape) for shape in products}

    def is_current(self, owner: nn.Module, dtype: torch.dtype) -> bool:
        return (
            self.precision.weights == dtype
            and self._autocast == autocasts()
            and extension.has_module_state((owner, *self._modules), self._state, Prepared)
            and self.has_current_weights()
        )

    def has_current_weights(self) -> bool:
        """Whether the weights are what they were, and products by the backends that are chosen now."""
        return self._weights.is_current() and all(
            extension.linear_backend(*shape) == backend for shape, backend in self._backends.items()
        )

    def encode(self, tokens: Tensor, cu_seqlens: Tensor, *, is_causal: bool = False) -> Tensor:
        """The last layer's output for packed ``tokens``, ``(tokens, dim)``, whose sequences' bounds are
        ``cu_seqlens``."""
        output = encode(
            self.in_stream(tokens), cu_seqlens, self.layers, norm_first=self.norm_first, is_causal=is_causal
        )
        return output.to(tokens.dtype)

    def in_stream(self, tokens: Tensor) -> Tensor:
        """``tokens`` as the engine takes them."""
        return tokens.resolve_neg().to(self.precision.stream)

    def requires_grad(self) -> bool:
        return self._weights.requires_grad()

    def is_watchable(self) -> bool:
        return self._weights.is_watchable()


def prepared_layers(
    owner: nn.Module,
    layers: Sequence[nn.Module],
    spec: LayerSpec,
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
    prepared = current_layers(owner, dtype)
    if prepared is None:
        owner.__dict__.pop(PREPARED, None)
        reason = grad_reason(owner)
        if reason is not None:
            return reason
        try:
            prepared = PreparedLayers(owner, layers, spec, dtype, name)
        except ValueError as error:
            return str(error)
        if prepared.is_watchable():
            owner.__dict__[PREPARED] = prepared
    elif torch.is_grad_enabled() and prepared.requires_grad():
        return grad_reason(owner)
    return prepared


def current_layers(owner: nn.Module, dtype: torch.dtype) -> PreparedLayers | None:
    """What ``owner`` keeps for inputs of ``dtype``, if nothing has changed since."""
    prepared = owner.__dict__.get(PREPARED)
    return prepared if isinstance(prepared, PreparedLayers) and prepared.is_current(owner, dtype) else None


def _first(layers: Sequence[nn.Module]) -> list[Tensor]:
    """A parameter of the first layer, in most cases: in training it tells at no cost that the call is recorded."""
    for layer in layers:
        for parameter in layer.parameters():
            return [parameter]
    return []
