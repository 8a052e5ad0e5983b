# SPDX-License-Identifier: BSD-3-Clause
"""Attention of packed batches on CUDA, by PyTorch's own kernels for sequences of unequal lengths: FlashAttention-2 (Dao
2023) for half types, memory-efficient attention (Rabe and Staats 2021) for float32 and what FlashAttention refuses.

FlashAttention draws its dropout from CUDA's generator, so the mask is its own: a call that gives a seed is not for it.
Memory-efficient attention computes no dropout here: for sequences of unequal lengths PyTorch's kernel numbers the draws
of its backward pass otherwise than those of its forward pass (pytorch/pytorch#115590).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from .build.extension import assume_constant_result
from .engine.packing import is_recorded

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_HALF_TYPES = (torch.bfloat16, torch.float16)
_AMPERE = (8, 0)  # the oldest architecture with FlashAttention and with bfloat16
_FLASH_HEAD_DIM = 192  # above it the backward pass wants more shared memory than most cards have
_MAX_SEQUENCES = 65535  # of a grid's second and third dimension
_VECTOR_BYTES = 16
_CAUSAL = 1  # CausalFromTopLeft in PyTorch's memory-efficient attention


def is_gpu(device: torch.device) -> bool:
    """Whether ``device`` is one that this is for."""
    return _architecture(device) is not None


def kernel_of(device: torch.device, dtype: torch.dtype, head_dim: int, dropout_p: float = 0.0) -> str | None:
    """``"flash"`` or ``"efficient"``, which computes queries of ``dtype`` on ``device``; None where neither does."""
    architecture = _architecture(device)
    if architecture is None or dropout_p >= 1.0 or (dtype == torch.bfloat16 and architecture < _AMPERE):
        return None
    is_half = dtype in _HALF_TYPES
    if is_half and architecture >= _AMPERE and head_dim % 8 == 0 and head_dim <= _FLASH_HEAD_DIM:
        return "flash"
    # The other adds gradients up in no fixed order.
    if dropout_p > 0.0 or torch.are_deterministic_algorithms_enabled() or not (is_half or dtype == torch.float32):
        return None
    if architecture >= _AMPERE:
        multiple = 8 if is_half else 4
    else:
        multiple = 4 if is_half else 1
    return "efficient" if head_dim % multiple == 0 else None


def has_kernel(
    query: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> bool:
    """Whether ``attend`` takes a call of queries like these, ``(..., head_dim)``, and of sequences like these."""
    if not is_gpu(query.device) or type(query) not in _PLAIN_TENSORS or query.dim() == 0:
        return False
    kernel = kernel_of(query.device, query.dtype, query.size(-1), dropout_p)
    if kernel is None or cu_seqlens.numel() - 1 > _MAX_SEQUENCES:
        return False
    if scale is not None and scale <= 0.0:  # FlashAttention looks for the largest score before it scales
        return False
    if kernel == "efficient" and max_seqlen is None and is_recorded(query):
        return False  # its backward pass takes memory for every sequence as if it were of the greatest length
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return torch.compiler.is_compiling() or (query.numel() > 0 and not torch.jit.is_tracing())


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
        max_seqlen: at least the longest sequence's length: what lies past it in a sequence is left out. Where None,
            all tokens may be one sequence's.
        scale: ``1 / sqrt(head_dim)`` where None.
        causal: each position sees itself and what precedes it.
        dropout_p: of the attention weights, below 1.

    Returns:
        ``(tokens, heads, head_dim)``.
    """
    max_seqlen = len(query) if max_seqlen is None else min(max_seqlen, len(query))
    bounds = cu_seqlens.to(query.device).contiguous()
    query, key, value = (_aligned(each) for each in (query, key, value))
    if kernel_of(query.device, query.dtype, query.size(-1), dropout_p) == "flash":
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
        0.0,
        _CAUSAL if causal else 0,
        keeps_logsumexp,
        scale=scale,
    )[0].squeeze(0)


@assume_constant_result
def _architecture(device: torch.device) -> tuple[int, int] | None:
    """The compute capability; None where ``device`` is no NVIDIA GPU."""
    # What torch.fx puts in a device's place can be asked nothing.
    if not isinstance(device, torch.device) or device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy where it does not lie as the kernels read it: each token's heads at multiples of 16 bytes."""
    if torch.compiler.is_compiling():  # which cannot ask where a tensor begins in its memory
        return x.clone(memory_format=torch.contiguous_format)
    vector = _VECTOR_BYTES // x.element_size()
    places = (*(s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1), x.storage_offset())
    lies_so = x.stride(-1) == 1 and all(place % vector == 0 for place in places)
    return x if lies_so else x.clone(memory_format=torch.contiguous_format)
