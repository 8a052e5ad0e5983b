# SPDX-License-Identifier: BSD-3-Clause
"""The way a batch takes through encoder layers, chosen at every call:

- **packed**: fused operators on real tokens only. Where the caller gives ``cu_seqlens``; where padding hides anything
  and may be skipped (padding.py); and without padding, where there is a kernel for the attention. Not with
  masks other than for padding and a causal one, nor with activations other than ReLU and GELU.
- **padded**: fused operators on the batch with its masks as given. Under torch.compile and export nothing depends on
  the masks' values.
- **by modules**: the parts are called one by one, as torch.nn does, because one of them has a hook or is not what was
  built (another norm, an adapter, a parametrization).

At positions that are not padded all three give what torch.nn computes without its fast path. Padded positions that are
skipped are zeros, after a final norm its bias, as with torch.nn's nested tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import cuda_attention
from ..build.extension import assume_constant_result
from ..engine.encode import encode_padded
from ..engine.packing import (
    check_sequences,
    equal_bounds,
    pack,
    packing_of,
    packing_of_sequences,
    unpack,
)
from ..engine.prepared import current_layers, prepared_layers
from ..engine.spec import LayerOptions
from .attention import AttentionPattern, has_attention_kernel
from .calls import record
from .eligibility import activation_name, autocast_reason, grad_reason, has_global_hooks, is_cpu_inference, is_eager
from .encoder_stack import LAYER, ResidualStream, run_layers
from .masks import (
    additive,
    batch_and_length,
    causal_mask,
    check_masks,
    hidden_keys,
    holds_only_padding,
    is_causal_mask,
    merge_masks,
)
from .padding import is_on_the_right, torch_may_skip


class Stack:
    """Encoder layers as one call sees them.

    Attributes:
        module: that is called.
        layers: at least one.
        final_norm: follows the last layer.
        by_modules: ``(src, mask, key_padding_mask, is_causal, skipped) -> output``, calling each module;
            ``skipped`` are positions to fill with zeros after the layers.
        prepared: the layers as inference has prepared them at an earlier call, if nothing has changed since.
        reason: why fused operators do not compute what these modules do; None where they do.
    """

    def __init__(
        self,
        module: nn.TransformerEncoder | nn.TransformerEncoderLayer,
        src: Tensor,
        by_modules: Callable[[Tensor, Tensor | None, Tensor | None, bool, Tensor | None], Tensor],
        reason: Callable[[Any], str | None],
    ) -> None:
        self.module, self.by_modules = module, by_modules
        is_encoder = isinstance(module, nn.TransformerEncoder)
        self.layers = module.layers if is_encoder else (module,)
        self.final_norm = module.norm if is_encoder else None
        may_infer = is_cpu_inference(src) and not has_global_hooks()
        self.prepared = current_layers(module, src.dtype) if may_infer else None
        self.reason = reason(module) if self.prepared is None else None

    @property
    def batch_first(self) -> bool:
        return getattr(self.layers[0].self_attn, "batch_first", False)

    def run(self, x: Tensor, pattern: AttentionPattern, *, owns_x: bool) -> Tensor:
        """The output of the layers and the final norm."""
        if (output := self._infer(x, pattern)) is not None:
            return self.normalize(output)
        return run_layers(self.layers, self.final_norm, x, pattern, owns_x=owns_x)

    def normalize(self, x: Tensor) -> Tensor:
        """The final norm of ``x``, which may be overwritten, if there is one."""
        return x if self.final_norm is None else ResidualStream(x, True).norm(self.final_norm)

    def _infer(self, x: Tensor, pattern: AttentionPattern) -> Tensor | None:
        """The output of the layers for packed ``x`` by the engine; None where the call asks for more than inference on
        the layers' weights, or some are pre-norm layers and some not."""
        if pattern.cu_seqlens is None or not is_cpu_inference(x) or autocast_reason() is not None:
            return None
        prepared = self.prepared or prepared_layers(self.module, self.layers, LAYER, x, x.dtype)
        if isinstance(prepared, str) or prepared.norm_first is None or x.size(-1) != self.layers[0].self_attn.embed_dim:
            return None
        return prepared.encode(x, pattern.cu_seqlens, is_causal=pattern.is_causal)


def encode_sequences(
    stack: Stack, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, is_causal: bool
) -> Tensor:
    """The output, ``(tokens, dim)``, for packed ``tokens`` whose sequences' bounds are ``cu_seqlens``."""
    if stack.reason is None:
        record(stack.module, "packed")
        on_gpu = cuda_attention.is_gpu(tokens.device)
        if max_seqlen is not None or on_gpu:  # all else is checked where it is read
            longest = check_sequences(cu_seqlens, len(tokens), max_seqlen)
            max_seqlen = longest if max_seqlen is None else max_seqlen
        if on_gpu:  # once for all layers
            cu_seqlens = cu_seqlens.to(tokens.device)
        pattern = AttentionPattern(is_causal=is_causal, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return stack.run(tokens, pattern, owns_x=False)
    packing = packing_of_sequences(cu_seqlens.to(tokens.device), tokens.size(0), max_seqlen)
    padded = _batch_first(unpack(tokens, packing), stack)
    output = _run_by_modules(stack, padded, None, packing.padding(), is_causal)
    return pack(_batch_first(output, stack), packing)


def encode_batch(
    stack: Stack, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool | None
) -> Tensor:
    """The output, of ``src``'s shape, for a padded batch or an unbatched sequence with torch.nn's masks."""
    if stack.reason is not None:
        is_causal = _is_causal(is_causal, mask, src, stack)
        return _run_by_modules(stack, src, mask, key_padding_mask, is_causal)
    check_masks(src, mask, key_padding_mask, stack.layers[0].self_attn.num_heads, stack.batch_first)
    if src.dim() == 2:
        batch_dim = 0 if stack.batch_first else 1
        keys = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        return encode_batch(stack, src.unsqueeze(batch_dim), mask, keys, is_causal).squeeze(batch_dim)
    reason = None
    if torch.is_grad_enabled() and is_eager(src):
        reason = grad_reason(stack.module, src, mask, key_padding_mask)
        if reason is None:  # nothing to record
            with torch.no_grad():
                return encode_batch(stack, src, mask, key_padding_mask, is_causal)

    is_causal = _is_causal(is_causal, mask, src, stack)
    if (
        torch.compiler.is_compiling()
        and (output := _run_traced(stack, src, mask, key_padding_mask, is_causal)) is not None
    ):
        return output
    hidden = None if key_padding_mask is None else hidden_keys(key_padding_mask)
    if hidden is not None and is_eager(src) and holds_only_padding(key_padding_mask, hidden):
        if not hidden.any():
            key_padding_mask = hidden = None
        elif (mask is None or is_causal) and _can_pack(stack) and _skips(stack, src, mask, key_padding_mask, hidden):
            return _run_packed(stack, src, hidden, is_causal, reason)
    if hidden is None and (mask is None or is_causal) and has_attention_kernel(src) and _can_pack(stack):
        return _run_unpadded(stack, src, is_causal, reason)
    return _run_padded(stack, src, mask, key_padding_mask, is_causal, reason)


def _run_traced(
    stack: Stack, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """The output by one operator, which reads the mask when it runs; None where the call is not to be that."""
    if torch.is_grad_enabled() or not src.is_cpu or (mask is not None and not is_causal):
        return None
    padding = "skip"
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool or stack.module.padding == "compute":
            return None
        if stack.module.padding == "auto":
            is_encoder = isinstance(stack.module, nn.TransformerEncoder)
            if not (is_encoder and torch_may_skip(stack.module, src, mask, key_padding_mask)):
                return None
            padding = "skip_if_trailing"
    options = _traced_options(stack.module, src.dtype, LAYER.traced_values(stack.layers))
    if options is None:
        return None
    output = encode_padded(
        _batch_first(src, stack),
        None if key_padding_mask is None else ~key_padding_mask,
        [parameter for layer in stack.layers for parameter in LAYER.parameters(layer)],
        LayerOptions(*options),
        num_layers=len(stack.layers),
        is_causal=is_causal,
        padding=padding,
    )
    return _batch_first(stack.normalize(output), stack).contiguous()


@assume_constant_result
def _traced_options(
    module: nn.TransformerEncoder | nn.TransformerEncoderLayer, dtype: torch.dtype, values: tuple
) -> tuple | None:
    """What all layers are beside their parameters, as they are while the call is traced, if they are to be one
    operator. ``values`` are those that it depends on and that torch.compile is to look at."""
    layers = module.layers if isinstance(module, nn.TransformerEncoder) else (module,)
    if autocast_reason() is not None:
        return None
    return LAYER.common_options(layers, dtype)


def _skips(
    stack: Stack, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, hidden: Tensor | None
) -> bool:
    """Whether padding is skipped where that is possible."""
    if stack.module.padding != "auto":
        return stack.module.padding == "skip"
    return (
        not torch.is_grad_enabled()
        and hidden is not None
        and isinstance(stack.module, nn.TransformerEncoder)
        and torch_may_skip(stack.module, src, mask, key_padding_mask)
        and is_on_the_right(hidden)
    )


def _can_pack(stack: Stack) -> bool:
    """Whether every activation treats positions alike: one that we do not know may do anything with a batch."""
    return all(activation_name(layer.activation) is not None for layer in stack.layers)


def _run_packed(stack: Stack, src: Tensor, padding: Tensor, is_causal: bool, reason: str | None) -> Tensor:
    packing = packing_of(~padding)
    record(stack.module, "packed", reason)
    pattern = AttentionPattern(is_causal=is_causal, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen)
    tokens = pack(_batch_first(src, stack), packing)
    output = unpack(stack.run(tokens, pattern, owns_x=True), packing)
    if stack.final_norm is not None and stack.final_norm.bias is not None:  # the norm of zeros
        output = torch.where(padding.unsqueeze(-1), stack.final_norm.bias.to(output.dtype), output)
    return _batch_first(output, stack).contiguous()


def _run_unpadded(stack: Stack, src: Tensor, is_causal: bool, reason: str | None) -> Tensor:
    record(stack.module, "packed", reason)
    x = _batch_first(src, stack)
    batch, length, dim = x.shape
    cu_seqlens = equal_bounds(batch, length)
    pattern = AttentionPattern(is_causal=is_causal, cu_seqlens=cu_seqlens, max_seqlen=length)
    output = stack.run(x.reshape(batch * length, dim), pattern, owns_x=False)
    return _batch_first(output.view(x.shape), stack).contiguous()


def _run_padded(
    stack: Stack,
    src: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    reason: str | None,
) -> Tensor:
    if reason is None and key_padding_mask is not None:
        record(stack.module, "padded", "padding is computed, or its mask is more than that", is_slow=False)
    else:
        record(stack.module, "padded", reason)
    batch, length = batch_and_length(src, stack.batch_first)
    num_heads = stack.layers[0].self_attn.num_heads
    mask, is_causal = merge_masks(
        mask, key_padding_mask, is_causal, batch=batch, length=length, num_heads=num_heads, like=src
    )
    pattern = AttentionPattern(stack.batch_first, mask, is_causal)
    return stack.run(src, pattern, owns_x=False)


def _run_by_modules(
    stack: Stack, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool
) -> Tensor:
    record(stack.module, "by modules", stack.reason)
    if is_causal and mask is None:
        mask = causal_mask(batch_and_length(src, stack.batch_first)[1], like=src)
    skipped = None
    if key_padding_mask is not None and is_eager(src) and stack.module.padding == "auto" and src.dim() == 3:
        hidden = hidden_keys(key_padding_mask)
        if _skips(stack, src, mask, key_padding_mask, hidden):
            skipped = (hidden if stack.batch_first else hidden.t()).unsqueeze(-1)
    mask = None if mask is None else additive(mask, src.dtype)
    key_padding_mask = None if key_padding_mask is None else additive(key_padding_mask, src.dtype)
    return stack.by_modules(src, mask, key_padding_mask, is_causal, skipped)


def _is_causal(is_causal: bool | None, mask: Tensor | None, src: Tensor, stack: Stack) -> bool:
    """The caller's word, or what the values of ``mask`` say where they may be read."""
    if is_causal is None:
        length = batch_and_length(src, stack.batch_first)[1]
        return mask is not None and is_eager(src) and is_causal_mask(mask, length)
    return is_causal


def _batch_first(x: Tensor, stack: Stack) -> Tensor:
    """From the stack's layout to ``(batch, length, dim)`` and back."""
    return x if stack.batch_first else x.transpose(0, 1)
