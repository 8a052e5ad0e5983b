# SPDX-License-Identifier: BSD-3-Clause
"""Attention masks as torch.nn gives them: bool (True hides a key) or float (added to the scores)."""

from __future__ import annotations

import torch
from torch import Tensor


def check_masks(
    x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_heads: int, batch_first: bool
) -> None:
    """Raises what torch.nn raises for an ``x`` or a mask of the wrong shape or dtype."""
    if x.dim() not in (2, 3):
        raise AssertionError(f"expected a 2-D (unbatched) or 3-D (batched) input, but got a {x.dim()}-D one")
    is_batched = x.dim() == 3
    batch, length = batch_and_length(x, batch_first)
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"expected {name} to be bool or floating point, but got {mask.dtype}")
    if key_padding_mask is not None:
        expected = (batch, length) if is_batched else (length,)
        if key_padding_mask.shape != expected:
            raise AssertionError(
                f"expected key_padding_mask of shape {expected}, but got {tuple(key_padding_mask.shape)}"
            )
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 3):
            raise AssertionError(f"expected a 2-D or 3-D attn_mask, but got a {attn_mask.dim()}-D one")
        expected = (length, length) if attn_mask.dim() == 2 else (batch * num_heads, length, length)
        if attn_mask.shape != expected:
            error = RuntimeError if is_batched or attn_mask.dim() == 2 else AssertionError
            raise error(f"expected attn_mask of shape {expected}, but got {tuple(attn_mask.shape)}")


def batch_and_length(x: Tensor, batch_first: bool) -> tuple[int, int]:
    """Batch size and sequence length of ``(batch, length, dim)``, ``(length, batch, dim)`` or ``(length, dim)``."""
    if x.dim() == 2:
        return 1, x.size(0)
    return (x.size(0), x.size(1)) if batch_first else (x.size(1), x.size(0))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask`` as it is added to the scores: in ``dtype``, -inf where a bool mask is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def causal_mask(length: int, like: Tensor) -> Tensor:
    """The additive ``(length, length)`` mask that hides later positions, in ``like``'s dtype and on its device."""
    return torch.full((length, length), -torch.inf, dtype=like.dtype, device=like.device).triu(1)


def is_causal_mask(mask: Tensor, length: int) -> bool:
    """Whether ``mask`` hides exactly the later positions of ``length``. Reads the values."""
    if mask.shape != (length, length):
        return False
    if mask.dtype == torch.bool:
        return torch.equal(mask, torch.ones_like(mask).triu(1))
    return torch.equal(mask, causal_mask(length, like=mask))


def hidden_keys(key_padding_mask: Tensor) -> Tensor:
    """True at the positions that ``key_padding_mask`` hides from every query."""
    return key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask == -torch.inf


def holds_only_padding(key_padding_mask: Tensor, hidden: Tensor) -> bool:
    """Whether ``key_padding_mask`` does nothing but hide ``hidden``. Reads the values of a float mask."""
    if key_padding_mask is hidden:
        return True
    return not key_padding_mask.requires_grad and bool((hidden | (key_padding_mask == 0)).all())


def merge_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    *,
    batch: int,
    length: int,
    num_heads: int,
    like: Tensor,
) -> tuple[Tensor | None, bool]:
    """``attn_mask`` and ``is_causal`` for scaled_dot_product_attention on ``(batch, num_heads, length, head_dim)``.

    As in torch.nn ``is_causal`` is the caller's word that the attention is causal; it then needs no ``attn_mask``.
    """
    if is_causal:
        if key_padding_mask is None:
            return None, True
        if attn_mask is None:
            attn_mask = causal_mask(length, like)
    merged = None
    if attn_mask is not None:
        merged = additive(attn_mask, like.dtype)
        if merged.dim() == 3:
            merged = merged.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        keys = additive(key_padding_mask, like.dtype).view(batch, 1, 1, length)
        merged = keys if merged is None else merged + keys
    return merged, False
