# SPDX-License-Identifier: BSD-3-Clause
"""Who takes part in bench_norm.py: each contender of an operation, on the same work.

A contender is made by ``bind(*arguments)``, with the arguments of our own operator, and is then called with none: what
it needs to have converted beforehand is not timed. Backward, ours and PyTorch's are the operators that autograd calls:
to enter its engine costs 15 µs on the CPU, once for a whole model. onnxruntime, having threads of its own, is in a
process of its own (onnxruntime_worker.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec

import torch
import torch.nn.functional as F
from norm_operations import DROPOUT_P, OPERATIONS, Case
from results import OURS
from torch import Tensor

from resnorm_ext.functional import add_layer_norm, add_rms_norm, layer_norm, rms_norm

Call = Callable[[], object]
Bind = Callable[..., Call]

COMPILED = "torch.compile"
WITH_BOTH = "ours, weight and bias"  # beside ours with fewer parameters


def contenders(case: Case, device: str, gradients: tuple[Tensor, ...]) -> dict[str, Bind]:
    """All that are installed and do this work on this device; ours comes first, before memory holds a right answer."""
    operation = OPERATIONS[case.operation]
    name = case.operation.removesuffix(" backward") + (" with sum" if operation.backward and operation.adds else "")
    ours, theirs = _FORMULAS[name]
    peers: dict[str, Bind] = {COMPILED: compiled(theirs, device)}
    if device == "cuda" and case.affine == "both":
        peers |= {peer: bind for (peer, package), bind in _CUDA_PEERS.get(name, {}).items() if find_spec(package)}
    if not operation.backward:
        if device == "cpu" and case.operation == "layer_norm" and case.dtype == "float32" and case.affine == "both":
            peers["oneDNN"] = _onednn
        return {OURS: _direct(ours), "torch": _direct(theirs), **peers}
    our_backward, their_backward = _BACKWARD_OPERATORS[case.operation]
    return {
        OURS: partial(our_backward, gradients),
        "torch": partial(their_backward, gradients),
        **{peer: partial(_backward, bind, gradients) for peer, bind in peers.items()},
    }


def _add_in_place(x, r, shape, weight, bias, eps):
    return add_layer_norm(x, r, shape, weight, bias, eps, out=x)


def _torch_add(x, r, shape, weight, bias, eps):
    return F.layer_norm(x + r, shape, weight, bias, eps)


def _torch_add_rms(x, r, shape, weight, eps):
    return F.rms_norm(x + r, shape, weight, eps)


def _torch_add_in_place(x, r, shape, weight, bias, eps):
    return F.layer_norm(x.add_(r), shape, weight, bias, eps)


def _torch_add_with_sum(x, r, shape, weight, bias, eps):
    s = r + x
    return F.layer_norm(s, shape, weight, bias, eps).to(x.dtype), s


def _torch_dropout_add(x, r, shape, weight, bias, eps):
    s = r + F.dropout(x, DROPOUT_P, training=True)
    return F.layer_norm(s, shape, weight, bias, eps), s


# Ours and PyTorch's, with the same arguments.
_FORMULAS = {
    "layer_norm": (layer_norm, F.layer_norm),
    "add_layer_norm": (add_layer_norm, _torch_add),
    "add_layer_norm in place": (_add_in_place, _torch_add_in_place),
    "add_layer_norm with sum": (partial(add_layer_norm, prenorm=True), _torch_add_with_sum),
    "dropout_add_layer_norm": (
        partial(add_layer_norm, prenorm=True, dropout_p=DROPOUT_P, training=True),
        _torch_dropout_add,
    ),
    "rms_norm": (rms_norm, F.rms_norm),
    "add_rms_norm": (add_rms_norm, _torch_add_rms),
}


def _direct(function: Callable) -> Bind:
    return lambda *arguments: partial(function, *arguments)


def compiled(function: Callable, device: str) -> Bind:
    def bind(*arguments) -> Call:
        torch.compiler.reset()  # each case is compiled for its own shape, never the fallback after too many
        torch._functorch.config.donated_buffer = False  # backward runs many times over one forward
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"  # the timer captures graphs itself
        if device == "cpu":
            torch._inductor.config.compile_threads = 1  # a pool of compilers would run beside what is timed
            # Their keys lack the instruction set: an earlier run's AVX2 loops, compiled for AVX-512, corrupt the heap.
            torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
        return partial(torch.compile(function, mode=mode, dynamic=False), *arguments)

    return bind


def _backward(bind: Bind, gradients: tuple[Tensor, ...], *arguments) -> Call:
    """What autograd makes of a forward."""
    arguments = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    outputs = bind(*arguments)()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [argument for argument in arguments if isinstance(argument, Tensor)]
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


def _our_norm_backward(gradients, x, shape, weight, bias, eps) -> Call:
    norm = (shape, weight, bias, eps, True)
    _, _, mean, rstd = torch.ops.resnorm._norm_forward(x, None, None, 0.0, None, None, *norm, False, True)
    saved = (None, x, mean, rstd, None, 0.0, None, x.dtype)
    return partial(torch.ops.resnorm._norm_backward, *gradients, *saved, *norm, _wanted(x, None, None, weight, bias))


def _their_norm_backward(gradients, x, shape, weight, bias, eps) -> Call:
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    saved = (x, shape, mean, rstd, weight, bias)
    return partial(torch.ops.aten.native_layer_norm_backward, *gradients, *saved, _wanted(x, weight, bias))


def _our_add_backward(gradients, x, r, shape, weight, bias, eps) -> Call:
    norm = (shape, weight, bias, eps, True)
    _, s, mean, rstd = torch.ops.resnorm._norm_forward(x, r, None, 0.0, None, None, *norm, True, True)
    saved = (s, mean, rstd, None, 0.0, None, s.dtype)
    shared = x.dtype == r.dtype  # autograd hands out one gradient twice then
    wanted = _wanted(None if shared else x, r, None, weight, bias)
    backward = partial(torch.ops.resnorm._norm_backward, *gradients, *saved, *norm, wanted)

    def call():
        dx, dr, _, dweight, dbias = backward()
        return dr if shared else dx, dr, dweight, dbias

    return call


def _their_add_backward(gradients, x, r, shape, weight, bias, eps) -> Call:
    dy, ds = gradients
    norm_backward = _their_norm_backward((dy,), r + x, shape, weight, bias, eps)

    def call():
        dx, dweight, dbias = norm_backward()
        dx = ds + dx
        return dx, dx, dweight, dbias

    return call


def _wanted(*tensors: Tensor | None) -> list[bool]:
    return [tensor is not None for tensor in tensors]


_BACKWARD_OPERATORS = {
    "layer_norm backward": (_our_norm_backward, _their_norm_backward),
    "add_layer_norm backward": (_our_add_backward, _their_add_backward),
    # Both by autograd, because torch has no operator of its own for it on the CPU.
    "rms_norm backward": tuple(partial(_backward, _direct(function)) for function in (rms_norm, F.rms_norm)),
}


def _onednn(x, shape, weight, bias, eps) -> Call:
    """oneDNN's primitive as PyTorch's own fuser reaches it, through the interpreter of TorchScript (3 µs a call)."""
    operator, _ = torch._C._jit_get_operation("prim::MKLDNNLayerNorm")
    return partial(operator, x.to_mkldnn(), shape, weight.to_mkldnn(), bias.to_mkldnn(), eps)


def _liger(x, shape, weight, bias, eps) -> Call:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return partial(LigerLayerNormFunction.apply, x, weight, bias, eps)


def _quack(x, shape, weight, bias, eps) -> Call:
    """Takes float32 parameters only, and has no autograd of its own for this."""
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            y, rstd, mean = layernorm_fwd(x, weight, bias, eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, rstd, mean = ctx.saved_tensors
            return layernorm_bwd(x, weight, dy, rstd, mean)

    if x.requires_grad:
        return partial(LayerNorm.apply, x, weight.float(), bias.float())
    return partial(layernorm_fwd, x, weight.float(), bias.float(), eps)


def _flash_attn_norm() -> Callable:
    """flash-attn's Triton kernel, also where its attention, which the package imports first, is not compiled."""
    try:
        import_module("flash_attn")
    except ImportError:
        sys.modules["flash_attn"] = module_from_spec(find_spec("flash_attn"))
    return import_module("flash_attn.ops.triton.layer_norm").layer_norm_fn


def _flash_attn(x, shape, weight, bias, eps) -> Call:
    return partial(_flash_attn_norm(), x, weight, bias, eps=eps)


def _flash_attn_add(x, r, shape, weight, bias, eps, dropout_p: float = 0.0) -> Call:
    return partial(_flash_attn_norm(), x, weight, bias, residual=r, eps=eps, dropout_p=dropout_p, prenorm=True)


# By operation: (name, package) -> bind.
_CUDA_PEERS = {
    "layer_norm": {
        ("Liger", "liger_kernel"): _liger,
        ("QuACK", "quack"): _quack,
        ("flash-attn", "flash_attn"): _flash_attn,
    },
    "add_layer_norm with sum": {("flash-attn", "flash_attn"): _flash_attn_add},
    "dropout_add_layer_norm": {("flash-attn", "flash_attn"): partial(_flash_attn_add, dropout_p=DROPOUT_P)},
}
