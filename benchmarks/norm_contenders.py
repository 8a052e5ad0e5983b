# SPDX-License-Identifier: BSD-3-Clause
"""Who takes part in bench_norm.py: each contender of an operation, on the same work.

A contender is made by ``bind(*arguments)``, with the arguments of our own operator, and is then called with none: what
it needs to have converted beforehand is not timed. Onnxruntime has threads of its own and so a process of its own
(onnxruntime_worker.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from norm_operations import DROPOUT_P, OPERATIONS, Case
from results import OURS
from torch import Tensor

from resnorm_ext.functional import add_layer_norm, layer_norm

Call = Callable[[], object]
Bind = Callable[..., Call]

COMPILED = "torch.compile"


def contenders(case: Case, device: str, gradients: tuple[Tensor, ...]) -> dict[str, Bind]:
    """All that are installed and do this work on this device; ours comes first, before memory holds a right answer."""
    name = case.operation.removesuffix(" backward")
    if OPERATIONS[case.operation].backward and OPERATIONS[case.operation].adds:
        name += " with sum"
    ours, theirs = _FORMULAS[name]
    found = {OURS: _direct(ours), "torch": _direct(theirs), COMPILED: _compiled(theirs, device)}
    if device == "cuda":
        peers = _CUDA_PEERS.get(name, {}) if case.affine == "both" else {}
        found |= {peer: bind for (peer, package), bind in peers.items() if find_spec(package)}
    elif case.operation == "layer_norm" and case.dtype == "float32" and case.affine == "both":
        found["oneDNN"] = _onednn
    if OPERATIONS[case.operation].backward:
        found = {peer: _backward(bind, gradients) for peer, bind in found.items()}
    return found


def _add_in_place(x, r, shape, weight, bias, eps):
    return add_layer_norm(x, r, shape, weight, bias, eps, out=x)


def _torch_add(x, r, shape, weight, bias, eps):
    return F.layer_norm(x + r, shape, weight, bias, eps)


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
}


def _direct(function: Callable) -> Bind:
    return lambda *arguments: partial(function, *arguments)


def _compiled(function: Callable, device: str) -> Bind:
    def bind(*arguments) -> Call:
        torch.compiler.reset()  # each case is compiled for its own shape, never the fallback after too many
        torch._functorch.config.donated_buffer = False  # backward runs many times over one forward
        if device == "cuda":
            mode = "max-autotune-no-cudagraphs"  # the timer captures graphs itself
        else:
            mode = "default"
            torch._inductor.config.compile_threads = 1  # a pool of compilers would run beside what is timed
        return partial(torch.compile(function, mode=mode, dynamic=False), *arguments)

    return bind


def _backward(bind: Bind, gradients: tuple[Tensor, ...]) -> Bind:
    def bind_backward(*arguments) -> Call:
        outputs = bind(*arguments)()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [argument for argument in arguments if isinstance(argument, Tensor)]
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    return bind_backward


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


def _flash_attn(x, shape, weight, bias, eps) -> Call:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return partial(layer_norm_fn, x, weight, bias, eps=eps)


def _flash_attn_add(x, r, shape, weight, bias, eps, dropout_p: float = 0.0) -> Call:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return partial(layer_norm_fn, x, weight, bias, residual=r, eps=eps, dropout_p=dropout_p, prenorm=True)


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
