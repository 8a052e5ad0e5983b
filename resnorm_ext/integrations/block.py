# SPDX-License-Identifier: BSD-3-Clause
"""A library's block on fused operators: dropout, residual add and layer norm in one pass, where its modules are as they
were built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..engine.prepared import PreparedLayers
from ..modules import LayerNorm
from ..modules.calls import record
from ..modules.eligibility import has_global_hooks
from ..modules.tracing import asks_for_original
from ..recording import is_exported
from .eligibility import is_as_built
from .spec import TransformersLayer
from .stack import LayerStack, layers_to_run

NORMS = (LayerNorm, nn.LayerNorm)


def add_norm(update: Tensor, residual: Tensor, norm: nn.Module, dropout: nn.Dropout | None = None) -> Tensor:
    """``norm(dropout(update) + residual)``."""
    if not _fuses(update, residual, norm, dropout):
        return norm(_dropped(update, dropout) + residual)
    return _add_layer_norm(update, residual, norm, dropout, prenorm=False)


def add_then_norm(
    update: Tensor, residual: Tensor, norm: nn.Module, dropout: nn.Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """``norm(x)`` and ``x = dropout(update) + residual``."""
    if not _fuses(update, residual, norm, dropout):
        x = _dropped(update, dropout) + residual
        return norm(x), x
    return _add_layer_norm(update, residual, norm, dropout, prenorm=True)


def add(update: Tensor, residual: Tensor, dropout: nn.Dropout | None = None) -> Tensor:
    """``dropout(update) + residual``."""
    if not _fuses(update, residual, None, dropout):
        return _dropped(update, dropout) + residual
    return functional.residual_add(update, residual, **_dropout_arguments(dropout))


def _fuses(update: Tensor, residual: Tensor, norm: nn.Module | None, dropout: nn.Module | None) -> bool:
    return (
        not (asks_for_original(update) or is_exported())
        and not has_global_hooks()
        and (dropout is None or is_as_built(dropout, nn.Dropout))
        and (norm is None or is_as_built(norm, *NORMS))
        and update.dtype == residual.dtype  # else the sum has the wider one, and so has its norm
        and update.shape == residual.shape
    )


def _dropped(update: Tensor, dropout: nn.Module | None) -> Tensor:
    return update if dropout is None else dropout(update)


def _dropout_arguments(dropout: nn.Dropout | None) -> dict[str, float | bool]:
    return {} if dropout is None else {"dropout_p": dropout.p, "training": dropout.training}


def _add_layer_norm(
    update: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout | None, *, prenorm: bool
) -> Tensor | tuple[Tensor, Tensor]:
    parameters = (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return functional.add_layer_norm(update, residual, *parameters, prenorm=prenorm, **_dropout_arguments(dropout))


def layer_for_inference(
    layer: nn.Module, spec: TransformersLayer, x: Tensor, arguments: dict[str, Any]
) -> PreparedLayers | None:
    """The prepared ``layer``, whose attention is not the engine's, where its call on ``x`` with these further arguments
    is inference on its weights alone. None where anything asks for the original computation."""
    if torch.compiler.is_compiling():
        return None
    stack = LayerStack(layer, [layer], spec, layer, [], spec.originals, spec.names_read, "compute", "the layer")
    prepared = layers_to_run(stack, x, x.dtype, arguments)
    if not isinstance(prepared, str) and (x.dim() != 3 or not x.numel()):
        prepared = f"the input is of shape {tuple(x.shape)}"
    if isinstance(prepared, str):
        record(layer, "original", prepared)
        return None
    record(layer, "fused")
    return prepared
