# SPDX-License-Identifier: BSD-3-Clause
"""Attention of packed batches on CUDA, by PyTorch's own kernels for sequences of unequal lengths: FlashAttention-2 (Dao
2023) for half types, memory-efficient attention (Rabe and Staats 2021) for float32 and what FlashAttention refuses.

Both draw their dropout from CUDA's generator, so the masks are theirs: a call that gives a seed is not for them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from .build.extension import assume_constant_result
from .engine.packing import is_recorded, longest_sequence

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_HALF_TYPES = (torch.bfloat16, torch.float16)
_FLASH_ARCHITECTURE = (8, 0)  # the oldest
_FLASH_HEAD_DIM = 192  # from there on its backward pass wants more shared memory than most cards have
_VECTOR = 8  # elements of half types that FlashAttention loads at once
_CAUSAL = 1  # CausalFromTopLeft in PyTorch's memory-efficient attention


def is_gpu(device: torch.device) -> bool:
    """Whether ``device`` is one that this is for."""
    return _architecture(device) is not None


def kernel_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """``"flash"`` or ``"efficient"``, which computes queries of ``dtype`` on ``device``; None where neither does."""
    architecture = _architecture(device)
    if architecture is None:
        return None
    has_flash = architecture >= _FLASH_ARCHITECTURE
    if has_flash and dtype in _HALF_TYPES and head_dim % _VECTOR == 0 and head_dim <= _FLASH_HEAD_DIM:
        return "flash"
    if torch.are_deterministic_algorithms_enabled():  # the other adds gradients up in no fixed order
        return None
    is_known = dtype in (torch.float32, torch.float16) or (dtype == torch.bfloat16 and has_flash)
    return "efficient" if is_known else None


def has_kernel(query: Tensor, scale: float | None = None) -> bool:
    """Whether ``attend`` takes a call of queries like these, ``(..., head_dim)``."""
    if type(query) not in _PLAIN_TENSORS or query.dim() == 0 or query.numel() == 0:
        return False
    if scale is not None and scale < 0.0:  # FlashAttention looks for the largest score before it scales
        return False
    if kernel_of(query.device, query.dtype, query.size(-1)) is None:
        return False
    return torch.compiler.is_compiling() or not (
        torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    *,
    scale: float | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """``dropout(softmax(query key^T * scale)) value`` within each sequence, where ``has_kernel``. Differentiable once.

    Args:
        query, key, value: ``(tokens, heads, head_dim)``.
        cu_seqlens: int32 ``(sequences + 1,)``, rising from 0 to ``tokens``, which nothing checks here.
        max_seqlen: at least the longest sequence's length; read from ``cu_seqlens`` where None, which waits for the
            GPU, but where the call ``is_recorded``.
        scale: ``1 / sqrt(head_dim)`` where None.
        causal: each position sees itself and what precedes it.
        dropout_p: of the attention weights.

    Returns:
        ``(tokens, heads, head_dim)``.
    """
    bounds = cu_seqlens.to(query.device)
    if max_seqlen is None:
        max_seqlen = len(query) if is_recorded(bounds) else longest_sequence(bounds)
    max_seqlen = min(max_seqlen, len(query))
    if kernel_of(query.device, query.dtype, query.size(-1)) == "flash":
        query, key, value = (each if _is_aligned(each) else each.contiguous() for each in (query, key, value))
        return torch.ops.aten._flash_attention_forward(
            query, key, value, bounds, bounds, max_seqlen, max_seqlen, dropout_p, causal, False, scale=scale
        )[0]
    query, key, value = (each.unsqueeze(0) for each in (query, key, value))
    keeps_logsumexp = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    return torch.ops.aten._efficient_attention_forward(
        query,
        key,
        value,
        None,
        bounds,
        bounds,
        max_seqlen,
        max_seqlen,
        dropout_p,
        _CAUSAL if causal else 0,
        keeps_logsumexp,
        scale=scale,
    )[0].squeeze(0)


@assume_constant_result
def _architecture(device: torch.device) -> tuple[int, int] | None:
    """The compute capability; None where ``device`` is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


def _is_aligned(x: Tensor) -> bool:
    """Whether FlashAttention reads ``x`` as it lies: every head of a token begins at a multiple of a vector."""
    # torch.compile cannot ask for an offset, and makes operands of its own that are aligned.
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    return x.stride(-1) == 1 and all(each % _VECTOR == 0 for each in (*x.stride()[:-1], offset))
