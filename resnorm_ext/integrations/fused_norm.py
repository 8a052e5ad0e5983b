# SPDX-License-Identifier: BSD-3-Clause
"""Dropout, residual add and layer norm of a library's block in one pass, where its modules are as they were built."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..modules import LayerNorm
from ..modules.eligibility import has_global_hooks
from .transformers import is_as_built

NORMS = (LayerNorm, nn.LayerNorm)


def add_norm(update: Tensor, residual: Tensor, norm: nn.Module, dropout: nn.Module | None = None) -> Tensor:
    """``norm(dropout(update) + residual)``."""
    fuses = (
        not has_global_hooks()
        and (dropout is None or is_as_built(dropout, nn.Dropout))
        and is_as_built(norm, *NORMS)
        and update.dtype == residual.dtype  # else the sum has the wider one, and so has its norm
        and update.shape == residual.shape
    )
    if not fuses:
        return norm((update if dropout is None else dropout(update)) + residual)
    return functional.add_layer_norm(
        update,
        residual,
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
        dropout_p=0.0 if dropout is None else dropout.p,
        training=dropout is not None and dropout.training,
    )
