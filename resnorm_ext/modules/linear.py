# SPDX-License-Identifier: BSD-3-Clause
"""The linear layers of the modules."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .. import functional
from ..engine.linear import LinearShape, choose_backends
from .eligibility import is_eager


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """``functional.linear``; the first eager call with a shape on the CPU measures which library is the faster."""
    if x.is_cpu and is_eager(x) and not torch.are_deterministic_algorithms_enabled():
        _choose_backend(LinearShape(weight.dtype, weight.size(1), weight.size(0)))
    return functional.linear(x, weight, bias, activation=activation)


@cache
def _choose_backend(shape: LinearShape) -> None:
    """Leaves no trace but the choice: the caller's random numbers and autocast stay out of the measurement."""
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        choose_backends([shape])
