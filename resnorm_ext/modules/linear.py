# SPDX-License-Identifier: BSD-3-Clause
"""The linear layers of the modules."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from .. import functional
from ..build.extension import extension
from ..engine.linear import LinearShape, choose_backends, prepare_linear
from ..engine.weights import WeightState
from .eligibility import autocasts, is_cpu_inference

# On a module: what inference has made of its weights.
PREPARED = "_resnorm_prepared"


class Prepared:
    """What a module keeps under ``PREPARED``. A copy or a pickle of it is None."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class _KeptLinear(Prepared):
    __slots__ = ("dtype", "linear", "weights")

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weights = WeightState(tensor for tensor in (weight, bias) if tensor is not None)
        self.linear = prepare_linear((weight, bias), dtype=dtype)

    def is_of(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
        tensors = self.weights.tensors
        return (
            tensors[0] is weight
            and (tensors[1] if len(tensors) == 2 else None) is bias
            and self.dtype == dtype
            and self.weights.is_current()
            and self.linear.backend == extension.linear_backend(dtype, weight.size(1), weight.size(0))
        )


def linear(owner: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """``functional.linear``; in inference on the CPU by whatever is the fastest, from prepared weights, which ``owner``
    keeps: the module whose only linear layer these parameters are.

    The first call with a shape measures which that is, unless results must repeat from run to run.
    """
    if not _is_inference(x, weight):
        return functional.linear(x, weight, bias, activation=activation)
    choose_backend(weight.dtype, weight)
    return prepared_linear(owner, weight, bias, weight.dtype)(x, activation)


def prepared_linear(
    owner: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> extension.PreparedLinear:
    """The layer as inference on the CPU multiplies by it in ``dtype``."""
    kept = owner.__dict__.get(PREPARED)
    if isinstance(kept, _KeptLinear) and kept.is_of(weight, bias, dtype):
        return kept.linear
    kept = _KeptLinear(weight, bias, dtype)
    if kept.weights.is_watchable():
        owner.__dict__[PREPARED] = kept
    return kept.linear


def choose_backend(dtype: torch.dtype, *weights: Tensor) -> list[LinearShape]:
    """Has these layers' shapes in ``dtype`` measured, once a process, and returns them."""
    shapes = [LinearShape(dtype, weight.size(1), weight.size(0)) for weight in weights]
    if not torch.are_deterministic_algorithms_enabled():
        for shape in dict.fromkeys(shapes):
            _choose_once(shape)
    return shapes


def _is_inference(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but the product is asked for, and ``weight`` stays for the calls to come."""
    return (
        is_cpu_inference(x)
        and not autocasts()
        and type(weight) is nn.Parameter
        and x.dtype == weight.dtype
        and x.size(-1) == weight.size(-1)
    )


@cache
def _choose_once(shape: LinearShape) -> None:
    choose_backends([shape])
