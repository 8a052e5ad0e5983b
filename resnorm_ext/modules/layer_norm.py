# SPDX-License-Identifier: BSD-3-Clause
"""``torch.nn.LayerNorm`` on this package's kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting

from .. import functional
from .originals import Originals, forwards
from .tracing import asks_for_original, for_torchscript, run_original

ORIGINALS = forwards(nn.LayerNorm) + Originals((F, "layer_norm"))


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm`: the same constructor, parameters and results, computed by ``functional.layer_norm``.

    Shape: any ``(*, *normalized_shape)``; the output has the input's shape and dtype. Weight and bias have the
    input's dtype, or float32 beside a half-precision input. Nested tensors, and subclasses that do not
    know the operator, are computed by torch.
    """

    _torch_forward = for_torchscript(nn.LayerNorm.forward)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._torch_forward(input)
        if not isinstance(self, LayerNorm) or asks_for_original(input) or ORIGINALS.reason() is not None:
            return run_original(nn.LayerNorm, self, input)
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
