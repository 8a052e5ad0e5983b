# SPDX-License-Identifier: BSD-3-Clause
"""What a fused path may assume about the modules, tensors and mode it meets: asked anew at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

_PLAIN_TENSORS = (nn.Parameter, Tensor)


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
    """Whether none of ``tensors`` is of a subclass that has its own idea of an operator."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in _PLAIN_TENSORS:
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
        or x.is_meta
        or type(x) not in _PLAIN_TENSORS
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def is_cpu_inference(x: Tensor) -> bool:
    """Whether a call on ``x`` is computed on the CPU, with values at hand and nothing asked for but the result."""
    return x.is_cpu and not torch.is_grad_enabled() and is_eager(x) and not torch.is_autocast_enabled("cpu")


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name by which ``functional.linear`` knows ``activation``, or None where it must be called."""
    if activation in (F.relu, torch.relu):
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if isinstance(activation, nn.Module):
        if is_plain(activation, nn.ReLU):
            return "relu"
        if is_plain(activation, nn.GELU):
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return None
