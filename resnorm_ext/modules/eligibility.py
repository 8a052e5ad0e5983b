# SPDX-License-Identifier: BSD-3-Clause
"""What a fused path may assume about the modules, tensors and mode it meets: asked anew at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

_PLAIN_TENSORS = (nn.Parameter, Tensor)
# As they were when this package was imported: others that are put in their place later compute something else.
_RELU, _GELU = (F.relu, torch.relu), F.gelu


def is_plain(
    module: nn.Module | None,
    *types: type[nn.Module],
    are_idle: Callable[[Iterable[Callable]], bool] | None = None,
) -> bool:
    """Whether calling ``module`` does what the ``forward`` of one of exactly these ``types`` does, and nothing else.

    False for subclasses (adapters, parametrizations), for hooks and an overridden ``forward`` on the instance, where it
    is compiled for itself, and where a parameter is a tensor subclass (quantized, distributed). ``are_idle`` tells
    forward hooks that do nothing.
    """
    return (
        type(module) in types
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not (module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and (not module._forward_hooks or (are_idle is not None and are_idle(module._forward_hooks.values())))
        and has_plain_tensors(module._parameters.values())
    )


def has_plain_tensors(tensors: Iterable[Tensor | None]) -> bool:
    """Whether none of ``tensors`` is sparse, or of a subclass that has its own idea of an operator."""
    types = (*_PLAIN_TENSORS, FakeTensor, FunctionalTensor) if torch.compiler.is_compiling() else _PLAIN_TENSORS
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in types or tensor.layout is not torch.strided):
            return False
    return True


def has_global_hooks() -> bool:
    """Whether a hook for all modules of the process is registered."""
    return _has_any_global_hook()


def is_eager(x: Tensor) -> bool:
    """Whether values may decide what runs and fresh tensors may be written: real data, and nobody records the call."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) not in _PLAIN_TENSORS
        or x.is_meta
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def is_cpu_inference(x: Tensor) -> bool:
    """Whether a call on ``x`` is computed on the CPU, with values at hand and nothing asked for but the result."""
    return not torch.is_grad_enabled() and is_eager(x) and x.is_cpu


def autocasts() -> bool:
    """Whether autocast is on for the CPU."""
    return torch.is_autocast_enabled("cpu")


def autocast_reason() -> str | None:
    """What about autocast on the CPU keeps a call from inference on prepared weights."""
    if not autocasts() or torch.get_autocast_dtype("cpu") == torch.bfloat16:
        return None
    return f"autocast is to {torch.get_autocast_dtype('cpu')}"


def products_under_autocast(x_dtype: torch.dtype) -> torch.dtype | None:
    """What autocast multiplies inputs and weights of ``x_dtype`` in; None without autocast."""
    return torch.bfloat16 if autocasts() and x_dtype == torch.float32 else None


def grad_reason(module: nn.Module, *tensors: Tensor | None) -> str | None:
    """Why a call of ``module`` on ``tensors`` has to be recorded for a backward pass, in words that say what to do;
    None where no gradient can be wanted."""
    if not torch.is_grad_enabled():
        return None
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            return f"grad mode is on and {name} requires grad: use torch.no_grad()"
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "grad mode is on and the input requires grad: use torch.no_grad()"
    return None


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name by which ``functional.linear`` knows ``activation``, or None where it must be called."""
    if activation in _RELU:
        return "relu"
    if activation is _GELU:
        return "gelu"
    if isinstance(activation, nn.Module):
        if is_plain(activation, nn.ReLU):
            return "relu"
        if is_plain(activation, nn.GELU):
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return None
