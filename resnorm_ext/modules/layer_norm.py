# SPDX-License-Identifier: BSD-3-Clause
"""``torch.nn.LayerNorm`` on this package's kernels."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm`: the same constructor, parameters and results, computed by ``functional.layer_norm``.

    Shape: any ``(*, *normalized_shape)``; the output has the input's shape and dtype. Weight and bias have the
    input's dtype, or float32 beside a half-precision input. Nested tensors are left to torch.nn.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return super().forward(input)
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
