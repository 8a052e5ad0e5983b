# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's CUDA kernels for packed attention, as far as a CPU can stand in for them: the operators' own signatures,
autograd formulas and conditions, by the formula in float32, with dropout from a state that the backward pass gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from resnorm_ext import cuda_attention


@contextmanager
def emulated(architecture: tuple[int, int] = (9, 0)) -> Iterator[Counter]:
    """The CPU counts as a GPU of ``architecture``. Yields how often each kernel has run."""
    calls: Counter = Counter()
    library = torch.library.Library("aten", "IMPL", "CPU")
    for name, kernel in _KERNELS.items():
        library.impl(name, _counting(name, kernel, calls))
    known = cuda_attention._architecture
    cuda_attention._architecture = lambda device: architecture if device.type == "cpu" else known(device)
    try:
        yield calls
    finally:
        cuda_attention._architecture = known
        library._destroy()


def _counting(name: str, kernel, calls: Counter):
    def counted(*args, **kwargs):
        calls[name] += 1
        return kernel(*args, **kwargs)

    return counted


def _flash_forward(query, key, value, cu_q, cu_k, max_q, max_k, dropout_p, causal, debug, *, scale=None, **_):
    assert 0.0 <= dropout_p < 1.0
    _check_flash((query, key, value), cu_q, cu_k, max_q, max_k)
    state = _new_state(dropout_p)
    output, logsumexp = _attention(query, key, value, cu_q, dropout_p, causal, scale, state)
    return output.to(query.dtype), logsumexp.float(), state, torch.empty(0), torch.empty(0)


def _flash_backward(
    grad,
    query,
    key,
    value,
    output,
    logsumexp,
    cu_q,
    cu_k,
    max_q,
    max_k,
    dropout_p,
    causal,
    state,
    _,
    *,
    scale=None,
    **__,
):
    _check_flash((query, key, value), cu_q, cu_k, max_q, max_k)
    assert grad.dtype == output.dtype == query.dtype and logsumexp.shape == (query.size(1), query.size(0))
    return _gradients(grad, query, key, value, cu_q, dropout_p, causal, scale, state)


def _efficient_forward(
    query, key, value, bias, cu_q, cu_k, max_q, max_k, dropout_p, mask, keeps=False, *, scale=None, **_
):
    _check_efficient((query, key, value), cu_q, cu_k, max_q, max_k)
    assert dropout_p == 0.0, "the backward pass would drop others"
    state = _new_state(dropout_p)
    output, _ = _attention(*(t[0] for t in (query, key, value)), cu_q, dropout_p, mask == 1, scale, state)
    # The formula of the backward pass here needs none; its shape is that of PyTorch's.
    logsumexp = torch.zeros(cu_q.numel() - 1, query.size(2), -(-max_q // 32) * 32 if keeps else 0)
    return output.to(query.dtype).unsqueeze(0), logsumexp, state[0], state[1], max_q, max_k


def _efficient_backward(
    grad,
    query,
    key,
    value,
    bias,
    output,
    cu_q,
    cu_k,
    max_q,
    max_k,
    logsumexp,
    dropout_p,
    seed,
    offset,
    mask,
    *_,
    **options,
):
    _check_efficient((query, key, value), cu_q, cu_k, max_q, max_k)
    assert logsumexp.numel(), "the forward pass has not kept the log-sum-exp"
    state = torch.stack((seed, offset))
    parts = (t[0] for t in (grad, query, key, value))
    gradients = _gradients(*parts, cu_q, dropout_p, mask == 1, options.get("scale"), state)
    return *(each.unsqueeze(0) for each in gradients), torch.empty(0)


_KERNELS = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_backward": _flash_backward,
    "_efficient_attention_forward": _efficient_forward,
    "_efficient_attention_backward": _efficient_backward,
}


def _check_flash(parts: tuple[Tensor, ...], cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    query = parts[0]
    assert query.dim() == 3 and query.dtype in (torch.bfloat16, torch.float16)
    assert _architecture() >= (8, 0) and query.size(-1) % 8 == 0 and query.size(-1) <= 256
    _check_layout(parts, multiple=8)
    _check_bounds(cu_q, cu_k, max_q, max_k, query.size(0))


def _check_efficient(parts: tuple[Tensor, ...], cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    """From Ampere on PyTorch has no kernels but those that load vectors of 16 bytes, before for half types of 8."""
    query = parts[0]
    assert query.dim() == 4 and query.size(0) == 1 and 0 < max_q <= query.size(1)
    assert query.dtype in (torch.float32, torch.float16) or (
        query.dtype == torch.bfloat16 and _architecture() >= (8, 0)
    )
    is_half = query.dtype != torch.float32
    _check_layout(parts, multiple=(8 if is_half else 4) if _architecture() >= (8, 0) else (4 if is_half else 1))
    _check_bounds(cu_q, cu_k, max_q, max_k, query.size(1))


def _check_layout(parts: tuple[Tensor, ...], multiple: int) -> None:
    """``multiple`` counts elements."""
    for each in parts:
        assert each.shape == parts[0].shape and each.dtype == parts[0].dtype and each.stride(-1) == 1
        assert each.size(-1) % multiple == 0, "no kernel found to launch"
        assert each.data_ptr() % (multiple * each.element_size()) == 0, "not aligned"
        assert all(s % multiple == 0 for s, n in zip(each.stride()[:-1], each.shape[:-1]) if n > 1), "not aligned"


def _architecture() -> tuple[int, int]:
    return cuda_attention._architecture(torch.device("cpu"))


def _check_bounds(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, tokens: int) -> None:
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert torch.equal(cu_q, cu_k) and cu_q.numel() >= 2
    lengths = cu_q.diff()
    assert cu_q[0] == 0 and cu_q[-1] == tokens and lengths.min() >= 0, "reads past the end"
    assert 0 < int(lengths.max()) <= max_q == max_k, "queries past max_q are left out"


def _new_state(dropout_p: float) -> Tensor:
    """Seed and offset; drawn only where dropout acts, as CUDA's generator is."""
    return torch.randint(2**62, (2,)) if dropout_p > 0.0 else torch.zeros(2, dtype=torch.int64)


def _sequences(parts: tuple[Tensor, ...], bounds: Tensor, dropout_p: float, causal: bool, scale: float, state: Tensor):
    """For each sequence the parts in float32, ``(heads, tokens, head_dim)``, its scores, and what dropout multiplies
    its attention weights by."""
    generator = torch.Generator().manual_seed(int(state[0]))
    for lengths in zip(*(part.float().split(bounds.diff().tolist()) for part in parts), strict=True):
        query, key, *others = (part.transpose(0, 1) for part in lengths)
        scores = query @ key.mT * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        kept = torch.ones_like(scores)
        if dropout_p > 0.0:
            kept = (torch.rand(scores.shape, generator=generator) >= dropout_p) / (1.0 - dropout_p)
        yield query, key, *others, scores, kept


def _attention(query, key, value, bounds, dropout_p, causal, scale, state) -> tuple[Tensor, Tensor]:
    """In float32: the output, ``(tokens, heads, head_dim)``, and the log-sum-exp, ``(heads, tokens)``."""
    outputs, logsumexps = [], []
    scale = query.size(-1) ** -0.5 if scale is None else scale
    for *_, v, scores, kept in _sequences((query, key, value), bounds, dropout_p, causal, scale, state):
        outputs.append(((scores.softmax(-1) * kept) @ v).transpose(0, 1))
        logsumexps.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(logsumexps, 1)


def _gradients(grad, query, key, value, bounds, dropout_p, causal, scale, state) -> tuple[Tensor, ...]:
    gradients = []
    scale = query.size(-1) ** -0.5 if scale is None else scale
    for q, k, v, g, scores, kept in _sequences((query, key, value, grad), bounds, dropout_p, causal, scale, state):
        weights = scores.softmax(-1)
        grad_weights = g @ v.mT * kept
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
        gradients.append((grad_scores @ k, grad_scores.mT @ q, (weights * kept).mT @ g))
    return tuple(torch.cat(each, 1).transpose(0, 1).to(query.dtype) for each in zip(*gradients, strict=True))
