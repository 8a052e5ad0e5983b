# SPDX-License-Identifier: BSD-3-Clause
"""The operators as functions: LayerNorm and residual-add in one pass over memory, and the products around them.

All of them take float32, float64, bfloat16 and float16 tensors of any strides, on any device (kernels of our own on
the CPU and, for the norms and residual_add, on CUDA; elsewhere torch's operators compute the same), and are
differentiable, also twice and under ``torch.func``. Statistics and accumulation are float32; float64 where the input or
the sum is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ._extension import ensure_loaded, extension


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``(input - mean) / sqrt(variance + eps) * weight + bias`` over the trailing ``normalized_shape``.

    As ``torch.nn.functional.layer_norm`` (Ba et al. 2016, "Layer normalization").

    Args:
        input: ``(*, *normalized_shape)``.
        normalized_shape: the trailing dimensions that make up a row.
        weight, bias: of ``normalized_shape``, in the input's dtype; float32 too beside a half-precision input.
        eps: added to the variance.
        out: receives the result; may be ``input``. Not differentiable.

    Returns:
        A contiguous tensor of the input's shape and dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        NotImplementedError: ``input`` is not floating point.
    """
    ops = _operators(input, weight, bias)
    if out is None:
        return ops.layer_norm(input, normalized_shape, weight, bias, eps)
    ops.layer_norm_out(input, normalized_shape, weight, bias, eps, out)
    return out


def residual_add(
    input: Tensor,
    residual: Tensor,
    input_bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``residual + dropout(input + input_bias)``.

    Args:
        input, residual: of one shape.
        input_bias: of the last dimension, in a dtype as for :func:`layer_norm`'s weight.
        dropout_p: probability to drop an element, applied where ``training``; rounded to a multiple of 2**-16.
        seed: int64 scalar tensor on the input's device that fixes the dropout mask; drawn where None.
        residual_dtype: dtype of the result, else the promoted dtype of input and residual.
        out: receives the result; may be ``input`` or ``residual``. Not differentiable.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: ``dropout_p`` outside [0, 1].
        NotImplementedError: ``input`` or ``residual`` is not floating point.
    """
    dropout_p, seed = _dropout(dropout_p, training, seed, input)
    ops = _operators(input, residual, input_bias)
    if out is None:
        return ops.residual_add(input, residual, input_bias, dropout_p, seed, residual_dtype)
    ops.residual_add_out(input, residual, input_bias, dropout_p, seed, residual_dtype, out)
    return out


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    prenorm: bool = False,
    residual_dtype: torch.dtype | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``s = residual + dropout(input + input_bias)`` and ``y = layer_norm(s)``, in one pass.

    ``y`` normalises the exact sum; ``s`` is that sum rounded to its own dtype.

    Args:
        input, residual: ``(*, *normalized_shape)``.
        normalized_shape, weight, bias, eps: as for :func:`layer_norm`.
        input_bias: of ``normalized_shape``, in a dtype as for the weight.
        dropout_p, training, seed: as for :func:`residual_add`.
        prenorm: return ``(y, s)``, as pre-norm layers need.
        residual_dtype: dtype of ``s``, else the promoted dtype of input and residual; float32 keeps a half-precision
            model's residual stream exact.
        out: receives ``y``, or with ``prenorm`` the pair ``(y, s)``. Each may be ``input`` or ``residual``. Not
            differentiable.

    Returns:
        ``y`` in the input's dtype; with ``prenorm`` the pair ``(y, s)``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: ``dropout_p`` outside [0, 1].
        NotImplementedError: ``input`` or ``residual`` is not floating point.
    """
    dropout_p, seed = _dropout(dropout_p, training, seed, input)
    ops = _operators(input, residual, weight, bias, input_bias)
    if out is None:
        y, s = ops.add_layer_norm(
            input,
            residual,
            normalized_shape,
            weight,
            bias,
            eps,
            input_bias,
            dropout_p,
            seed,
            prenorm,
            residual_dtype,
        )
        return (y, s) if prenorm else y
    y_out, s_out = _outputs(out, prenorm)
    ops.add_layer_norm_out(
        input,
        residual,
        normalized_shape,
        weight,
        bias,
        eps,
        input_bias,
        dropout_p,
        seed,
        residual_dtype,
        y_out,
        s_out,
    )
    return out


def bias_activation(
    input: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``activation(input + bias)``, in one pass.

    Args:
        input: of any shape.
        bias: of the last dimension, in a dtype as for :func:`layer_norm`'s weight.
        activation: ``"relu"``, ``"gelu"`` (by erf) or ``"gelu_tanh"``.
        out: receives the result; may be ``input``. Not differentiable.

    Returns:
        A contiguous tensor of the input's shape and dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: another ``activation``.
        NotImplementedError: ``input`` is not floating point.
    """
    ops = _operators(input, bias)
    if out is None:
        return ops.bias_activation(input, bias, activation)
    ops.bias_activation_out(input, bias, activation, out)
    return out


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(input @ weight.T + bias) + residual``.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``; bias: ``(out_features,)``.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (by erf) or ``"gelu_tanh"``.
        residual: ``(*, out_features)``.
    """
    return _operators(input, weight, bias, residual).linear(input, weight, bias, activation, residual)


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """``softmax(q k^T * scale) v`` within each sequence of a packed batch: no padding, so no mask.

    Args:
        qkv: ``(tokens, 3, heads, head_dim)``, the sequences one after another.
        cu_seqlens: int32 ``(sequences + 1,)``, where each sequence starts and the last one ends, on the CPU or qkv's
            device.
        max_seqlen: length of the longest sequence, where the caller knows it.
        scale: ``1 / sqrt(head_dim)`` where None.
        causal: each position sees itself and what precedes it.

    Returns:
        ``(tokens, heads, head_dim)``.
    """
    return _operators(qkv, cu_seqlens).packed_attention(qkv, cu_seqlens, max_seqlen, scale, causal)


def _operators(*tensors: Tensor | None):
    """The door to the operators: pybind11 in eager code, the cheaper; ``torch.ops`` where somebody traces.

    Both lead to the same dispatcher entries, with the same arguments.
    """
    if torch.compiler.is_compiling() or has_torch_function_variadic(*tensors):
        ensure_loaded()
        return torch.ops.resnorm
    return extension


def _outputs(out: object, prenorm: bool) -> tuple[Tensor, Tensor | None]:
    """``add_layer_norm``'s ``out`` as (y, s)."""
    if prenorm and not (isinstance(out, tuple | list) and len(out) == 2):
        raise TypeError(f"expected out to be a pair (y, s), as prenorm=True returns, but got {type(out).__name__}")
    y, s = out if prenorm else (out, None)
    for tensor in (y, s) if prenorm else (y,):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected out to be a Tensor, but got {type(tensor).__name__}")
    return y, s


def _dropout(p: float, training: bool, seed: Tensor | None, input: Tensor) -> tuple[float, Tensor | None]:
    """The dropout that acts at this call, with its seed."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p == 0.0:
        return 0.0, None
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=input.device)
    return p, seed
