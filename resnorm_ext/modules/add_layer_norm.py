# SPDX-License-Identifier: BSD-3-Clause
"""Dropout, residual add and layer norm in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting

from .. import functional


class AddLayerNorm(nn.LayerNorm):
    """``layer_norm(residual + dropout(input + input_bias))``: what stands between two blocks of a Transformer.

    Parameters and state_dict keys are those of :class:`torch.nn.LayerNorm`: a checkpoint of one loads into the other.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in :class:`torch.nn.LayerNorm`.
        dropout_p: probability of zeroing an element of the input in train mode.
        prenorm: return the sum too, for the next residual add of a pre-norm Transformer.
        residual_dtype: dtype of that sum; by default the promoted dtype of input and residual.

    Shape: input and residual ``(*, *normalized_shape)``, input_bias ``normalized_shape``. Returns ``y`` with the
    input's shape and dtype, or ``(y, sum)`` with ``prenorm=True``.

    Raises ValueError for a ``dropout_p`` outside [0, 1].

    Example::

        >>> norm = AddLayerNorm(768, dropout_p=0.1)
        >>> x = norm(attention(x), x)
    """

    __constants__ = (*nn.LayerNorm.__constants__, "prenorm")  # by which TorchScript knows the type of the result

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
        prenorm: bool = False,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"expected dropout_p between 0 and 1, but got {dropout_p}")
        self.dropout_p = dropout_p
        self.prenorm = prenorm
        self.residual_dtype = residual_dtype

    # Without a type for the result: TorchScript would take its users' word for both.
    def forward(self, input: Tensor, residual: Tensor, input_bias: Tensor | None = None):
        if is_scripting():
            update = input if input_bias is None else input + input_bias
            total = residual + F.dropout(update, self.dropout_p, self.training)
            output = F.layer_norm(total, self.normalized_shape, self.weight, self.bias, self.eps)
            return (output, total) if self.prenorm else output
        return functional.add_layer_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            input_bias=input_bias,
            dropout_p=self.dropout_p,
            training=self.training,
            prenorm=self.prenorm,
            residual_dtype=self.residual_dtype,
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, dropout_p={self.dropout_p}, prenorm={self.prenorm}, "
            f"residual_dtype={self.residual_dtype}"
        )
