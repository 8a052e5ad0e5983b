# SPDX-License-Identifier: BSD-3-Clause
"""The norms of ``torch.nn`` on this package's kernels, alone and with the residual add before them in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting

from .. import functional
from .originals import Originals, forwards
from .tracing import asks_for_original, for_torchscript, run_original

LAYER_NORM_ORIGINALS = forwards(nn.LayerNorm) + Originals((F, "layer_norm"))
RMS_NORM_ORIGINALS = forwards(nn.RMSNorm) + Originals((F, "rms_norm"))


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """``getattr(module, name)``, but past ``nn.Module.__getattr__``, which takes as long as the norm of a short row.
    What is parametrized, pruned or flattened is a plain attribute."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


_HALVES = (torch.bfloat16, torch.float16)


def _fit(input: torch.dtype, weight: torch.dtype) -> bool:
    """Whether the operators take such a weight beside such an input. torch's rms_norm, which promotes, takes any."""
    if input == weight:
        return input in (torch.float32, torch.float64, *_HALVES)
    return weight == torch.float32 and input in _HALVES


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``: the same constructor, parameters and results, computed by ``functional.layer_norm``.

    Shape: any ``(*, *normalized_shape)``; the output has the input's shape and dtype. Weight and bias have the
    input's dtype, or float32 beside a half-precision input. Nested tensors, and subclasses that do not
    know the operator, are computed by torch.
    """

    _torch_forward = for_torchscript(nn.LayerNorm.forward)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._torch_forward(input)
        if not isinstance(self, LayerNorm) or asks_for_original(input) or LAYER_NORM_ORIGINALS.reason() is not None:
            return run_original(nn.LayerNorm, self, input)
        weight, bias = _parameter(self, "weight"), _parameter(self, "bias")
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``: the same constructor, parameters and results, computed by ``functional.rms_norm``.

    Shapes are as for ``LayerNorm``. Beside dtypes that the operator does not take torch's own forward runs.
    """

    _torch_forward = for_torchscript(nn.RMSNorm.forward)

    def forward(self, x: Tensor) -> Tensor:
        if is_scripting():
            return self._torch_forward(x)
        if not isinstance(self, RMSNorm) or asks_for_original(x) or RMS_NORM_ORIGINALS.reason() is not None:
            return run_original(nn.RMSNorm, self, x)
        weight = _parameter(self, "weight")
        if not _fit(x.dtype, x.dtype if weight is None else weight.dtype):
            return run_original(nn.RMSNorm, self, x)
        return functional.rms_norm(x, self.normalized_shape, weight, self.eps)


class _AddNorm:
    """What the two classes below add to a norm of ``torch.nn``."""

    def _set_add(self, dropout_p: float, prenorm: bool, residual_dtype: torch.dtype | None) -> None:
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"expected dropout_p between 0 and 1, but got {dropout_p}")
        self.dropout_p = dropout_p
        self.prenorm = prenorm
        self.residual_dtype = residual_dtype

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, dropout_p={self.dropout_p}, prenorm={self.prenorm}, "
            f"residual_dtype={self.residual_dtype}"
        )


class AddLayerNorm(_AddNorm, nn.LayerNorm):
    """``layer_norm(residual + dropout(input + input_bias))``: what stands between two blocks of a Transformer.

    Parameters and state_dict keys are those of ``torch.nn.LayerNorm``: a checkpoint of one loads into the other.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in ``torch.nn.LayerNorm``.
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
        self._set_add(dropout_p, prenorm, residual_dtype)

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


class AddRMSNorm(_AddNorm, nn.RMSNorm):
    """``rms_norm(residual + dropout(input + input_bias))``; parameters are those of ``torch.nn.RMSNorm``.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in ``torch.nn.RMSNorm``.
        dropout_p, prenorm, residual_dtype: as in ``AddLayerNorm``, as shapes, results and errors are.
    """

    __constants__ = (*nn.RMSNorm.__constants__, "prenorm")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
        prenorm: bool = False,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._set_add(dropout_p, prenorm, residual_dtype)

    def forward(self, input: Tensor, residual: Tensor, input_bias: Tensor | None = None):
        if is_scripting():
            update = input if input_bias is None else input + input_bias
            total = residual + F.dropout(update, self.dropout_p, self.training)
            output = F.rms_norm(total, self.normalized_shape, self.weight, self.eps)
            return (output, total) if self.prenorm else output
        return functional.add_rms_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.eps,
            input_bias=input_bias,
            dropout_p=self.dropout_p,
            training=self.training,
            prenorm=self.prenorm,
            residual_dtype=self.residual_dtype,
        )
