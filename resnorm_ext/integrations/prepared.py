# SPDX-License-Identifier: BSD-3-Clause
"""The weights of layers as inference reads them, kept until anything about the layers changes: looking at some hundred
modules at every call costs more than a short sentence's arithmetic, comparing what they hold does not. What has been
replaced since goes at the next call that asks, with ``refresh`` or with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._extension import extension
from ..engine.linear import LinearShape, generation
from .layer_kind import LayerKind, layer_shapes, layer_weights, parts_as_built
from .replace import PREPARED


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Layers' weights and what they were made from. A copy or a pickle of it is None.

    Attributes:
        modules: all below the owner, which holds this and is not held by it.
        state: what owner and modules held.
        tensors: what the weights were made of.
        backends: of the layers' products.
        generation: of all that is kept of parameters.
    """

    layers: list[extension.LayerWeights]
    dtype: torch.dtype
    modules: tuple[nn.Module, ...]
    state: tuple[object, ...]
    tensors: list[Tensor]
    fingerprint: int
    backends: dict[LinearShape, str]
    generation: int

    def is_current(self, owner: nn.Module, dtype: torch.dtype) -> bool:
        return (
            self.dtype == dtype
            and self.generation == generation()
            and extension.has_module_state((owner, *self.modules), self.state, self)
            and extension.weight_fingerprint(self.tensors) == self.fingerprint
            and all(extension.linear_backend(*shape) == backend for shape, backend in self.backends.items())
        )

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def prepared_layers(
    owner: nn.Module, layers: Sequence[nn.Module], kind: LayerKind, dtype: torch.dtype, name: str = "layer.{}"
) -> list[extension.LayerWeights] | str:
    """The weights of ``layers`` for a call in ``dtype``; or what stands against it: ``name``, with the layer's index,
    and why.

    ``owner`` is the module that keeps them, and that holds ``layers`` or is the only one of them.
    """
    prepared = owner.__dict__.get(PREPARED)
    if prepared is not None and prepared.is_current(owner, dtype):
        return prepared.layers
    owner.__dict__.pop(PREPARED, None)
    # What changes from here on, by another thread, is found changed at the next call.
    kept_from = generation()
    _, *modules = owner.modules()
    state = extension.module_state((owner, *modules))
    tensors = [tensor for layer in layers for tensor in _tensors(layer, kind)]
    fingerprint = extension.weight_fingerprint(tensors)
    found = []
    for index, layer in enumerate(layers):
        weights = layer_weights(layer, kind, dtype)
        if isinstance(weights, str):
            return f"{name.format(index)}{weights}"
        found.append(weights)
    if not any(tensor.is_inference() for tensor in tensors):  # they count no versions: changes would go unnoticed
        shapes = (shape for layer in layers for shape in layer_shapes(layer, kind))
        backends = {shape: extension.linear_backend(*shape) for shape in shapes}
        owner.__dict__[PREPARED] = Prepared(
            found, dtype, tuple(modules), state, tensors, fingerprint, backends, kept_from
        )
    return found


def _tensors(layer: nn.Module, kind: LayerKind) -> list[Tensor]:
    """Those that a layer's weights were made of."""
    parts = parts_as_built(layer, kind)
    if isinstance(parts, str):
        return []
    modules = [parts[name] for name in (*kind.projections, *kind.denses(), *kind.norms())]
    return [tensor for module in modules for tensor in module._parameters.values() if tensor is not None]
