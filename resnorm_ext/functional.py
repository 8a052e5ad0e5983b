# SPDX-License-Identifier: BSD-3-Clause
"""The operators as functions: norms and residual-add in one pass over memory, and the products around them.

All of them take float32, float64, bfloat16 and float16 tensors of any strides, on any device (kernels of our own on
the CPU and, for the norms and residual_add, on CUDA; elsewhere torch's operators compute the same), and are
differentiable, also twice (but ``packed_attention`` on CUDA) and under ``torch.func``. Statistics and accumulation
are float32; float64 where the input or the sum is float64. DTensors may be sharded along every dimension that results
are independent in; nested tensors, and subclasses that do not know these operators, are computed by torch's functions,
without ``out``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _is_tracing
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_variadic

from . import composite, cuda_attention, sharding
from .build.extension import assume_constant_result, ensure_loaded, extension
from .engine.packing import check_sequences
from .recording import is_exported


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
    if out is None:
        return _call("layer_norm", input, normalized_shape, weight, bias, eps)
    _call("layer_norm_out", input, normalized_shape, weight, bias, eps, out)
    return out


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``input / sqrt(mean of input**2 + eps) * weight`` over the trailing ``normalized_shape``.

    As ``torch.nn.functional.rms_norm`` (Zhang and Sennrich 2019, "Root mean square layer normalization"). Squares are
    summed in the accumulation type: a row whose squares add up beyond float32's range, 3e38, gives zeros, as torch's
    does.

    Args:
        input: ``(*, *normalized_shape)``.
        normalized_shape: the trailing dimensions that make up a row.
        weight: of ``normalized_shape``, in a dtype as for ``layer_norm``.
        eps: added to the mean; where None the machine epsilon of the type that it is computed in, as torch's kernels
            have it: float32's for half-precision inputs too.
        out: receives the result; may be ``input``. Not differentiable.

    Returns, Raises: as ``layer_norm``.
    """
    if out is None:
        return _call("rms_norm", input, normalized_shape, weight, eps)
    _call("rms_norm_out", input, normalized_shape, weight, eps, out)
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
        input_bias: of the last dimension, in a dtype as for ``layer_norm``'s weight.
        dropout_p: probability to drop an element, applied where ``training``; rounded to a multiple of 2**-16.
        seed: int64 scalar tensor on the input's device that fixes the dropout mask; drawn where None.
        residual_dtype: dtype of the result, else the promoted dtype of input and residual.
        out: receives the result; may be ``input`` or ``residual``. Not differentiable.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: ``dropout_p`` outside [0, 1].
        NotImplementedError: ``input`` or ``residual`` is not floating point.
    """
    input, input_bias, dropout_p, seed = _dropout(input, input_bias, dropout_p, training, seed)
    if out is None:
        return _call("residual_add", input, residual, input_bias, dropout_p, seed, residual_dtype)
    _call("residual_add_out", input, residual, input_bias, dropout_p, seed, residual_dtype, out)
    return out


@overload
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
    prenorm: Literal[False] = False,
    residual_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
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
    prenorm: Literal[True],
    residual_dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
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
    prenorm: bool,
    residual_dtype: torch.dtype | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
        normalized_shape, weight, bias, eps: as for ``layer_norm``.
        input_bias: of ``normalized_shape``, in a dtype as for the weight.
        dropout_p, training, seed: as for ``residual_add``.
        prenorm: return ``(y, s)``, as pre-norm layers need.
        residual_dtype: dtype of ``s``, else the promoted dtype of input and residual; float32 keeps a half-precision
            model's residual stream exact.
        out: receives ``y``, or with ``prenorm`` the pair ``(y, s)``. Each may be ``input`` or ``residual``. Not
            differentiable.

    Returns:
        ``y`` in the input's dtype; with ``prenorm`` the pair ``(y, s)``. ``y`` is of the exact sum, ``s`` that sum
        rounded: where a float16 ``s`` overflows, ``y`` does not, but its row's gradients are Inf or NaN, so that a
        GradScaler skips the step.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: ``dropout_p`` outside [0, 1].
        NotImplementedError: ``input`` or ``residual`` is not floating point.
    """
    input, input_bias, dropout_p, seed = _dropout(input, input_bias, dropout_p, training, seed)
    if out is None:
        y, s = _call(
            "add_layer_norm",
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
    _call(
        "add_layer_norm_out",
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


@overload
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    prenorm: Literal[False] = False,
    residual_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    prenorm: Literal[True],
    residual_dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    prenorm: bool,
    residual_dtype: torch.dtype | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    prenorm: bool = False,
    residual_dtype: torch.dtype | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``s = residual + dropout(input + input_bias)`` and ``y = rms_norm(s)``, in one pass.

    Args:
        normalized_shape, weight: as for ``rms_norm``.
        eps: added to the mean of the squares; where None the machine epsilon of float32, of float64 where the input or
            ``s`` is float64.
        input, residual, input_bias, dropout_p, training, seed, prenorm, residual_dtype, out: as for
            ``add_layer_norm``.

    Returns, Raises: as ``add_layer_norm``.
    """
    input, input_bias, dropout_p, seed = _dropout(input, input_bias, dropout_p, training, seed)
    if out is None:
        y, s = _call(
            "add_rms_norm",
            input,
            residual,
            normalized_shape,
            weight,
            eps,
            input_bias,
            dropout_p,
            seed,
            prenorm,
            residual_dtype,
        )
        return (y, s) if prenorm else y
    y_out, s_out = _outputs(out, prenorm)
    _call(
        "add_rms_norm_out",
        input,
        residual,
        normalized_shape,
        weight,
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
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``dropout(activation(input + bias))``, in one pass.

    Args:
        input: of any shape.
        bias: of the last dimension, in a dtype as for ``layer_norm``'s weight.
        activation: ``"relu"``, ``"gelu"`` (by erf) or ``"gelu_tanh"``.
        dropout_p, training, seed: as for ``residual_add``.
        out: receives the result; may be ``input``. Not differentiable.

    Returns:
        A contiguous tensor of the input's shape and dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: another ``activation``, ``dropout_p`` outside [0, 1].
        NotImplementedError: ``input`` is not floating point.
    """
    if out is None and _drops_by_itself(input, dropout_p, training, seed):
        return F.dropout(bias_activation(input, bias, activation), dropout_p)
    dropout_p, seed = _dropout_seed(input, dropout_p, training, seed)
    if out is None:
        return _call("bias_activation", input, bias, activation, dropout_p, seed)
    _call("bias_activation_out", input, bias, activation, dropout_p, seed, out)
    return out


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """``activation(input @ weight.T + bias)``.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``; bias: ``(out_features,)``.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (by erf) or ``"gelu_tanh"``.
    """
    return _call("linear", input, weight, bias, activation)


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """``dropout(activation(input @ weight1.T + bias1)) @ weight2.T + bias2`` (Vaswani et al. 2017, section 3.3).

    For the backward pass it keeps the first product alone: neither what dropout left of the activations nor a mask.

    Args:
        input: ``(*, in_features)``.
        weight1: ``(hidden_features, in_features)``; bias1: ``(hidden_features,)``.
        weight2: ``(out_features, hidden_features)``; bias2: ``(out_features,)``.
        activation: ``"relu"``, ``"gelu"`` (by erf) or ``"gelu_tanh"``.
        dropout_p, training, seed: as for ``residual_add``, of the activations.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: another ``activation``, ``dropout_p`` outside [0, 1].
        NotImplementedError: ``input`` is not floating point.
    """
    if _drops_by_itself(input, dropout_p, training, seed):
        return linear(F.dropout(linear(input, weight1, bias1, activation=activation), dropout_p), weight2, bias2)
    dropout_p, seed = _dropout_seed(input, dropout_p, training, seed)
    return _call("feed_forward", input, weight1, bias1, weight2, bias2, activation, dropout_p, seed)


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """``dropout(softmax(q k^T * scale)) v`` within each sequence of a packed batch: no padding, so no mask.

    Args:
        qkv: ``(tokens, 3, heads, head_dim)``, the sequences one after another.
        cu_seqlens: int32 ``(sequences + 1,)``, where each sequence starts and the last one ends, on the CPU or qkv's
            device.
        max_seqlen: length of the longest sequence, where the caller knows it.
        scale: ``1 / sqrt(head_dim)`` where None.
        causal: each position sees itself and what precedes it.
        dropout_p, training, seed: as for ``residual_add``, of the attention weights.

    Returns:
        ``(tokens, heads, head_dim)``.

    On CUDA PyTorch's own kernels compute this where they can (cuda_attention.py), differentiable once; not float64,
    what torch.func transforms, float32 with dropout, nor with a given seed.
    """
    if _drops_by_itself(qkv, dropout_p, training, seed):
        return composite.packed_attention(qkv, cu_seqlens, max_seqlen, scale, causal, dropout_p, None)
    if seed is None and cuda_attention.is_gpu(qkv.device) and _is_packed(qkv, cu_seqlens):
        p, cast = _dropout_probability(dropout_p, training), qkv
        if torch.is_autocast_enabled(qkv.device.type) and qkv.dtype != torch.float64:
            cast = qkv.to(torch.get_autocast_dtype(qkv.device.type))
        if cuda_attention.has_kernel(cast, cu_seqlens, max_seqlen, scale=scale, dropout_p=p):
            longest = check_sequences(cu_seqlens, len(qkv), max_seqlen)
            max_seqlen = longest if max_seqlen is None else max_seqlen
            query, key, value = cast.unbind(1)
            return cuda_attention.attend(
                query, key, value, cu_seqlens, max_seqlen, scale=scale, causal=causal, dropout_p=p
            )
    dropout_p, seed = _dropout_seed(qkv, dropout_p, training, seed)
    return _call("packed_attention", qkv, cu_seqlens, max_seqlen, scale, causal, dropout_p, seed)


def _is_packed(qkv: Tensor, cu_seqlens: Tensor) -> bool:
    """Whether these are of the shape and the devices that a packed batch has: the operator says what is wrong."""
    return qkv.dim() == 4 and qkv.size(1) == 3 and (cu_seqlens.is_cpu or cu_seqlens.device == qkv.device)


def _call(name: str, *arguments: object) -> Tensor | tuple[Tensor, ...] | None:
    """What operator ``name`` returns.

    There are two doors to the dispatcher's entry: pybind11 in eager code, the cheaper; ``torch.ops`` where somebody
    traces or ``__torch_function__`` asks to see the call. What to do where it is refused is thought of only then: calls
    that go through pay nothing for it.
    """
    if is_compiling():
        _prepare_for_tracing()
        by_torch = arguments[0].is_nested or is_exported()
        return getattr(composite if by_torch else torch.ops.resnorm, name)(*arguments)
    door = composite if _is_tracing() and hasattr(composite, name) else extension
    try:
        if door is extension and has_torch_function_variadic(*arguments):
            ensure_loaded()
            door = torch.ops.resnorm
        return getattr(door, name)(*arguments)
    except Exception as refusal:
        door, arguments = _another_way(door, name, arguments, refusal)
    return getattr(door, name)(*arguments)


@assume_constant_result
def _prepare_for_tracing() -> None:
    """Does what an eager call would do after a refusal; in code that torch.compile traces, while it traces."""
    ensure_loaded()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sharding.register_rules()


def _another_way(door: object, name: str, arguments: tuple, refusal: Exception) -> tuple[object, tuple]:
    """A door and arguments for a call that ``door`` refused; raises ``refusal`` where there are none."""
    foreign = any(map(_is_foreign, arguments))
    if foreign and isinstance(refusal, NotImplementedError) and name.endswith("_out"):
        operator = name.removesuffix("_out")
        raise NotImplementedError(f"{operator}: with out, nested tensors and subclasses are not supported") from refusal
    if any(map(sharding.is_dtensor, arguments)):
        if not isinstance(refusal, NotImplementedError):
            raise refusal  # It knows the rules.
        if sharding.register_rules():
            return door, arguments
    # A subclass is asked first, because most pass on the operators that they do not know.
    if foreign and hasattr(composite, name) and not isinstance(refusal, ImportError):
        return composite, arguments
    raise refusal


_PLAIN_TENSORS = (Tensor, nn.Parameter)


def _is_foreign(value: object) -> bool:
    """Whether ``value`` is a tensor that has its own idea of an operator."""
    if type(value) in _PLAIN_TENSORS:
        return value.is_nested
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor | FunctionalTensor)


def _outputs(out: object, prenorm: bool) -> tuple[Tensor, Tensor | None]:
    """``out`` as (y, s)."""
    if isinstance(out, Tensor) and not prenorm:
        return out, None
    if prenorm and not (isinstance(out, tuple | list) and len(out) == 2):
        raise TypeError(f"expected out to be a pair (y, s), as prenorm=True returns, but got {type(out).__name__}")
    for tensor in out if prenorm else (out,):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected out to be a Tensor, but got {type(tensor).__name__}")
    return tuple(out)


def _dropout(
    input: Tensor, input_bias: Tensor | None, p: float, training: bool, seed: Tensor | None
) -> tuple[Tensor, Tensor | None, float, Tensor | None]:
    """``input`` and ``input_bias``, the dropout that acts on their sum at this call, and its seed."""
    if _drops_by_itself(input, p, training, seed):
        return F.dropout(input if input_bias is None else input + input_bias, p), None, 0.0, None
    return input, input_bias, *_dropout_seed(input, p, training, seed)


def _drops_by_itself(input: Tensor, p: float, training: bool, seed: Tensor | None) -> bool:
    """Whether dropout acts whose random numbers are ``input``'s own: those of a sharded tensor differ between
    devices."""
    return training and p > 0.0 and seed is None and _is_foreign(input)


def _dropout_seed(input: Tensor, p: float, training: bool, seed: Tensor | None) -> tuple[float, Tensor | None]:
    """The probability to drop an element at this call, and the seed of the mask."""
    p = _dropout_probability(p, training)
    if p == 0.0:
        return 0.0, None
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=input.device)
    return p, seed


def _dropout_probability(p: float, training: bool) -> float:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return p if training else 0.0
