# SPDX-License-Identifier: BSD-3-Clause
"""The linear layers of the modules."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from .. import functional
from .._extension import extension
from ..engine.linear import LinearShape, choose_backends, prepare_linear
from .eligibility import is_cpu_inference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """``functional.linear``; in inference on the CPU by whatever is the fastest, from prepared weights.

    The first call with a shape measures which that is, unless results must repeat from run to run.
    """
    if not _is_inference(x, weight):
        return functional.linear(x, weight, bias, activation=activation)
    return prepared_linear(weight, bias)(x, activation)


def prepared_linear(weight: Tensor, bias: Tensor | None) -> extension.PreparedLinear:
    """The layer as inference on the CPU multiplies by it."""
    if not torch.are_deterministic_algorithms_enabled():
        _choose_backend(LinearShape(weight.dtype, weight.size(1), weight.size(0)))
    return prepare_linear((weight, bias))


def _is_inference(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but the product is asked for, and ``weight`` stays for the calls to come."""
    return (
        is_cpu_inference(x)
        and type(weight) is nn.Parameter
        and x.dtype == weight.dtype
        and x.size(-1) == weight.size(-1)
    )


@cache
def _choose_backend(shape: LinearShape) -> None:
    choose_backends([shape])
