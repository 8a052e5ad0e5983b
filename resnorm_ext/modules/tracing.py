# SPDX-License-Identifier: BSD-3-Clause
"""Where a module of this package computes as the class it derives from: the one place that knows which calls ask so.

A forward begins like this::

    if is_scripting():  # TorchScript compiles no further
        return self._torch_forward(input)
    if asks_for_original(input):
        return run_original(nn.LayerNorm, self, input)
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from ..recording import is_exported
from .eligibility import has_global_hooks, is_plain


def asks_for_original(x: Tensor) -> bool:
    """Whether a call on ``x`` is none for fused operators: ``x`` is a nested tensor, or torch.fx's for one to come.

    Asked at every call of every module, so it has to cost next to nothing.
    """
    return x.is_nested if type(x) is Tensor else isinstance(x, Proxy) or x.is_nested


def run_original(original: type[nn.Module], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``original``'s forward computes for ``module``, or what torch.fx would record of a call of ``original``."""
    proxy = next((value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)), None)
    if proxy is not None:
        path = _leaf_path(proxy.tracer, module, original)
        if path is not None:
            return proxy.tracer.create_proxy("call_module", path, args, kwargs)
    if is_exported() and not torch.compiler.is_dynamo_compiling():
        with _without_fast_path():
            return original.forward(module, *args, **kwargs)
    return original.forward(module, *args, **kwargs)


def for_torchscript(forward: Callable) -> Callable:
    """``forward`` as a method ``_torch_forward``, which TorchScript compiles from its source under that name."""
    method = types.FunctionType(
        forward.__code__, forward.__globals__, "_torch_forward", forward.__defaults__, forward.__closure__
    )
    method.__annotations__, method.__doc__ = forward.__annotations__, forward.__doc__
    return method


def _leaf_path(tracer: object, module: nn.Module, original: type[nn.Module]) -> str | None:
    """The name of ``module`` in what ``tracer`` traces, if that would keep an ``original`` whole: then ``module`` stays
    what it is, in the graph too. Not where more than its forward runs around this call, which has been recorded."""
    if not isinstance(tracer, Tracer) or module is tracer.root or _does_more(module):
        return None
    if _quantizes(tracer) and original is nn.LayerNorm:
        return None  # it knows nn.LayerNorm by its exact class, or by the function that this calls
    try:
        path = tracer.path_of_module(module)
    except NameError:  # not a part of what is traced
        return None
    whole = copy.copy(module)
    whole.__class__ = original
    return path if tracer.is_leaf_module(whole, path) else None


def _does_more(module: nn.Module) -> bool:
    """Whether calling ``module`` is more than the forward that this package has for it."""
    forward = getattr(type(module).forward, "__module__", None) or ""
    is_ours = forward.startswith(__package__.partition(".")[0] + ".")
    return not (is_ours and is_plain(module, type(module))) or has_global_hooks()


def _quantizes(tracer: Tracer) -> bool:
    library = sys.modules.get("torch.ao.quantization.fx.tracer")
    return library is not None and isinstance(tracer, library.QuantizationTracer)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """torch.nn's own fast path is no computation to record: it is wrong for some masks, and ONNX does not know it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
