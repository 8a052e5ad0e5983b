# SPDX-License-Identifier: BSD-3-Clause
"""The linear layers of the modules."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..build.extension import extension
from ..engine.linear import LinearShape, choose_backends, prepare_linear
from ..engine.prepared import PREPARED, Prepared
from ..engine.weights import WeightState
from .eligibility import autocasts, is_cpu_inference


def linear(owner: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """``functional.linear``; in inference on the CPU by whatever is the fastest, from prepared weights, which ``owner``
    keeps: the module whose only linear layer these parameters are.

    The first call with a shape measures which that is, unless results must repeat from run to run.
    """
    if not _is_inference(x, weight):
        return functional.linear(x, weight, bias, activation=activation)
    return prepared_linear(owner, weight, bias)(x, activation)


def prepared_linear(owner: nn.Module, weight: Tensor, bias: Tensor | None) -> extension.PreparedLinear:
    """The layer as inference on the CPU multiplies by it."""
    kept = owner.__dict__.get(PREPARED)
    if isinstance(kept, _KeptLinear) and kept.is_of(weight, bias):
        return kept.linear
    kept = _KeptLinear(weight, bias)
    if kept.weights.is_watchable():
        owner.__dict__[PREPARED] = kept
    return kept.linear


class _KeptLinear(Prepared):
    __slots__ = ("_shape", "linear", "weights")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._shape = LinearShape(weight.dtype, weight.size(1), weight.size(0))
        choose_backends([self._shape])
        self.weights = WeightState(tensor for tensor in (weight, bias) if tensor is not None)
        self.linear = prepare_linear((weight, bias))

    def is_of(self, weight: Tensor, bias: Tensor | None) -> bool:
        tensors = self.weights.tensors
        return (
            tensors[0] is weight
            and (tensors[1] if len(tensors) == 2 else None) is bias
            and self.weights.is_current()
            and self.linear.backend == extension.linear_backend(*self._shape)
        )


def _is_inference(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but the product is asked for, and ``weight`` stays for the calls to come."""
    return (
        is_cpu_inference(x)
        and not autocasts()
        and type(weight) is nn.Parameter
        and x.dtype == weight.dtype
        and x.size(-1) == weight.size(-1)
    )
