# SPDX-License-Identifier: BSD-3-Clause
"""The weights of layers as inference reads them, kept until anything about the layers changes: looking at some hundred
modules at every call costs more than a short sentence's arithmetic, comparing what they hold does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._extension import extension
from ..engine.layers import LayerWeights
from .layer_kind import LayerKind, layer_weights, parts_as_built
from .replace import PREPARED


class Prepared:
    """What ``prepared_layers`` has found. A copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.modules: tuple[nn.Module, ...] = ()
        self.state: tuple[object, ...] = ()
        self.tensors: list[Tensor] = []
        self.fingerprint = 0
        self.dtype: torch.dtype | None = None
        self.layers: list[LayerWeights] = []

    def is_current(self, dtype: torch.dtype) -> bool:
        return (
            self.dtype == dtype
            and extension.has_module_state(self.modules, self.state)
            and extension.weight_fingerprint(self.tensors) == self.fingerprint
        )

    def __deepcopy__(self, memo: dict) -> Prepared:
        return Prepared()

    def __reduce__(self) -> tuple[type[Prepared], tuple[()]]:
        return Prepared, ()


def prepared_layers(
    owner: nn.Module, layers: Sequence[nn.Module], kind: LayerKind, dtype: torch.dtype, name: str = "layer.{}"
) -> list[LayerWeights] | str:
    """The weights of ``layers`` for a call in ``dtype``; or what stands against it: ``name``, with the layer's index,
    and why.

    ``owner`` is the module that keeps them, and that holds ``layers`` or is the only one of them.
    """
    prepared = owner.__dict__.get(PREPARED)
    if prepared is None:
        prepared = owner.__dict__[PREPARED] = Prepared()
    if prepared.is_current(dtype):
        return prepared.layers
    prepared.forget()
    found = []
    for index, layer in enumerate(layers):
        weights = layer_weights(layer, kind, dtype)
        if isinstance(weights, str):
            return f"{name.format(index)}{weights}"
        found.append(weights)
    tensors = [tensor for layer in layers for tensor in _tensors(layer, kind)]
    if not any(tensor.is_inference() for tensor in tensors):  # they count no versions: changes would go unnoticed
        prepared.modules = tuple(owner.modules())
        prepared.state = extension.module_state(prepared.modules)
        prepared.tensors, prepared.fingerprint = tensors, extension.weight_fingerprint(tensors)
        prepared.dtype, prepared.layers = dtype, found
    return found


def _tensors(layer: nn.Module, kind: LayerKind) -> list[Tensor]:
    """Those that are copied into a layer's weights."""
    parts = parts_as_built(layer, kind)
    linears = [parts[name] for name in (*kind.projections, *kind.denses())]
    return [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]
