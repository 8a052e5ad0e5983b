# SPDX-License-Identifier: BSD-3-Clause
"""Dropout (Srivastava et al. 2014) of activations that no residual sum follows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import functional
from .eligibility import is_eager


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p)`` in one pass over ``x``, whose mask is drawn in registers, and again in the backward pass:
    torch's draws one into memory, ten times as slowly on a CPU, and keeps it.

    ``residual_add`` does so beside its sum, which here is with zeros.
    """
    if not is_eager(x) or not x.is_floating_point() or x.dim() == 0:
        return F.dropout(x, p)
    return functional.residual_add(x, x.new_zeros(x.size(-1)).expand_as(x), dropout_p=p, training=True)
