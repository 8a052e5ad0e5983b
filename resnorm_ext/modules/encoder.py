# SPDX-License-Identifier: BSD-3-Clause
"""``torch.nn.TransformerEncoder`` and its layer on fused operators, with no work on padding in inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting

from ..recording import is_exported
from .attention import ORIGINALS as ATTENTION_ORIGINALS
from .attention import SelfAttention
from .calls import record
from .eligibility import is_plain
from .encoder_paths import Stack, encode_batch, encode_sequences
from .encoder_stack import is_plain_norm, layer_reason
from .norm import LayerNorm
from .originals import Originals
from .padding import PaddingChoice
from .tracing import asks_for_original, for_torchscript, run_original

_LAYER = ATTENTION_ORIGINALS + Originals(
    *((nn.TransformerEncoderLayer, name) for name in ("forward", "_sa_block", "_ff_block"))
)
_ENCODER = _LAYER + Originals((nn.TransformerEncoder, "forward"))


class TransformerEncoderLayer(PaddingChoice, nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``: the same constructor, initialisation, state_dict keys and masks.

    Attention dropout, activation dropout and the two residual dropouts act at the rates of ``self_attn.dropout``,
    ``dropout``, ``dropout1`` and ``dropout2``.

    Attributes:
        padding: ``"auto"``, the default, and ``"compute"``: padded positions are computed, as torch.nn does;
            ``"skip"``: they are not, and are zeros.
    """

    _torch_forward = for_torchscript(nn.TransformerEncoderLayer.forward)

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        self.self_attn.__class__ = SelfAttention
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The layer's output, of ``src``'s shape.

        Args:
            src: ``(batch, length, d_model)``, ``(length, batch, d_model)`` without ``batch_first``, unbatched
                ``(length, d_model)``, or with ``cu_seqlens`` packed ``(tokens, d_model)``.
            src_mask: ``(length, length)`` or ``(batch * nhead, length, length)``; bool hides where True, float is added
                to the scores.
            src_key_padding_mask: ``(batch, length)``, or ``(length,)`` where unbatched; bool or float likewise.
            is_causal: the attention is causal. A ``src_mask`` given too is taken to say the same.
            cu_seqlens: int32 ``(sequences + 1,)``, the bounds of packed sequences; instead of masks.
            max_seqlen: the longest packed sequence's length, where known.

        Raises AssertionError or RuntimeError, as torch.nn does, for a ``src`` or mask of wrong shape or dtype, and
        ValueError for masks together with ``cu_seqlens``.
        """
        if is_scripting():
            assert cu_seqlens is None, "TorchScript computes no packed sequences"
            return self._torch_forward(src, src_mask, src_key_padding_mask, is_causal)
        if not isinstance(self, TransformerEncoderLayer) or _runs_original(self, src, cu_seqlens, _LAYER):
            return _run_original(
                nn.TransformerEncoderLayer, self, src, src_mask, src_key_padding_mask, is_causal, cu_seqlens, max_seqlen
            )
        stack = Stack(self, src, self._forward_by_modules, layer_reason)
        return _encode(stack, src, src_mask, src_key_padding_mask, is_causal, cu_seqlens, max_seqlen)

    def _forward_by_modules(
        self,
        x: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        skipped: Tensor | None,
    ) -> Tensor:
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class TransformerEncoder(PaddingChoice, nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder``: the same constructor, state_dict keys and masks.

    Args:
        encoder_layer: a layer of this package or of torch.nn, whose copies become this package's.
        num_layers: number of copies.
        norm: applied to the output of the last layer.
        enable_nested_tensor, mask_check: as in torch.nn, with no nested tensors: where these would be taken, padding is
            skipped.

    Attributes:
        padding: ``"auto"``, the default: padded positions are skipped, and zeros, exactly where torch.nn would take
            nested tensors; else computed. ``"skip"``: skipped wherever that is possible, in training too.
            ``"compute"``: always computed.
    """

    _torch_forward = for_torchscript(nn.TransformerEncoder.forward)

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor, mask_check)
        for layer in self.layers:
            if type(layer) is nn.TransformerEncoderLayer:
                layer.__class__ = TransformerEncoderLayer

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The output of all layers and the norm, of ``src``'s shape.

        The arguments are those of ``TransformerEncoderLayer.forward``; ``is_causal=None`` finds out, outside
        torch.compile and export, whether ``mask`` is the causal one.
        """
        if is_scripting():
            assert cu_seqlens is None, "TorchScript computes no packed sequences"
            return self._torch_forward(src, mask, src_key_padding_mask, is_causal)
        if not isinstance(self, TransformerEncoder) or _runs_original(self, src, cu_seqlens, _ENCODER):
            return _run_original(
                nn.TransformerEncoder, self, src, mask, src_key_padding_mask, is_causal, cu_seqlens, max_seqlen
            )
        stack = Stack(self, src, self._forward_by_modules, encoder_reason)
        return _encode(stack, src, mask, src_key_padding_mask, is_causal, cu_seqlens, max_seqlen)

    def _forward_by_modules(
        self,
        x: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        skipped: Tensor | None,
    ) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=key_padding_mask, is_causal=is_causal)
        if skipped is not None:
            x = x.masked_fill(skipped, 0.0)
        return x if self.norm is None else self.norm(x)


def encoder_reason(encoder: nn.TransformerEncoder) -> str | None:
    """Why fused operators do not compute what ``encoder`` does; None where they do."""
    if encoder.norm is not None and not is_plain_norm(encoder.norm):
        return "norm has hooks or is not a plain LayerNorm"
    for index, layer in enumerate(encoder.layers):
        if not is_plain(layer, TransformerEncoderLayer, nn.TransformerEncoderLayer):
            return f"layer {index} has hooks or is not a plain TransformerEncoderLayer"
        reason = layer_reason(layer)
        if reason is not None:
            return f"layer {index}: {reason}"
    return None


def _runs_original(
    module: nn.TransformerEncoder | nn.TransformerEncoderLayer,
    src: Tensor,
    cu_seqlens: Tensor | None,
    originals: Originals,
) -> bool:
    """Whether torch.nn's forward is to run, which knows no ``cu_seqlens``."""
    if asks_for_original(src):
        return True
    layers = getattr(module, "layers", (module,))
    if not all(isinstance(layer, nn.TransformerEncoderLayer) for layer in layers):
        reason = "its layers are of classes of their own"
    else:
        reason = "the call is exported" if is_exported() else originals.reason()
    if reason is None or cu_seqlens is not None:
        return False
    record(module, "original", reason)
    return True


def _run_original(
    original: type[nn.Module],
    module: nn.Module,
    src: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    """torch.nn's forward; packed sequences are given only where torch.fx records the call."""
    sequences = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    return run_original(original, module, src, mask, key_padding_mask, is_causal, **sequences)


def _encode(
    stack: Stack,
    src: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    src = src.resolve_neg()
    if cu_seqlens is None:
        return encode_batch(stack, src, mask, key_padding_mask, is_causal)
    if mask is not None or key_padding_mask is not None:
        raise ValueError("expected either cu_seqlens or masks, but got both")
    return encode_sequences(stack, src, cu_seqlens, max_seqlen, bool(is_causal))
