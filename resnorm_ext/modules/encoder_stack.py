# SPDX-License-Identifier: BSD-3-Clause
"""The dataflow of encoder layers on fused operators: one residual stream from the first layer to the last norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import functional
from ..engine.spec import Dropouts, LayerSpec, module_at
from .attention import AttentionPattern, SelfAttention, is_self_attention, kept_for_backward, self_attention
from .eligibility import has_global_hooks, is_eager, is_plain
from .feed_forward import feed_forward
from .norm import LayerNorm


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether ``norm`` is a layer norm that a fused operator may compute."""
    return is_plain(norm, LayerNorm, nn.LayerNorm)


LAYER = LayerSpec(
    types=(),  # a layer that is called is ours, and the stack knows its own
    parts={
        "self_attn": (SelfAttention, nn.MultiheadAttention),
        "self_attn.out_proj": (NonDynamicallyQuantizableLinear,),
    },
    attention="self_attn",
    scaling=None,
    projections=("self_attn.in_proj_",),
    attention_output="self_attn.out_proj.",
    attention_norm="norm1",
    intermediate="linear1.",
    activation=("", "activation"),
    output="linear2.",
    feed_forward_norm="norm2",
    dropouts=Dropouts(
        attention_weights=("self_attn", "dropout"),
        attention_update=("dropout1", "p"),
        activation=("dropout", "p"),
        update=("dropout2", "p"),
    ),
    norm_first=None,
)


def layer_reason(layer: nn.TransformerEncoderLayer) -> str | None:
    """Why ``run_layers`` does not compute what ``layer`` does; None where it does: all parts are as they were built."""
    reason = LAYER.reason(layer)
    if reason is not None:
        return reason.lstrip(".")
    for block in ("_sa_block", "_ff_block"):
        if block in layer.__dict__ or getattr(type(layer), block) is not getattr(nn.TransformerEncoderLayer, block):
            return f"{block} is overridden"
    attention = layer.self_attn
    if not is_self_attention(attention):
        return "self_attn is not self-attention of equal dimensions"
    embed_dim, num_heads = attention.embed_dim, attention.num_heads
    if attention.in_proj_weight.shape != (3 * embed_dim, embed_dim) or embed_dim % num_heads:
        return "self_attn's in_proj_weight is not of its embed_dim and num_heads"
    for norm in LAYER.norms():
        if tuple(module_at(layer, norm).normalized_shape) != (embed_dim,):
            return f"{norm} is not over embed_dim"
    return "hooks for all modules are registered" if has_global_hooks() else None


def run_layers(
    layers: Sequence[nn.TransformerEncoderLayer],
    final_norm: nn.LayerNorm | None,
    x: Tensor,
    pattern: AttentionPattern,
    *,
    owns_x: bool,
) -> Tensor:
    """The output of ``layers`` that fused operators compute, then ``final_norm``.

    Args:
        x: ``(batch, length, dim)``, ``(length, batch, dim)`` or packed ``(tokens, dim)``, as ``pattern`` says.
        owns_x: whether ``x`` may be overwritten.
    """
    stream = ResidualStream(x, owns_x)
    normed = None  # the norm of the stream, where adding to it has computed that too
    for index, layer in enumerate(layers):
        if not layer.norm_first:
            x = stream.x if stream.owns_x else kept_for_backward(stream.x, pattern.batch_first)
            stream.add_and_normalize(self_attention(layer.self_attn, x, pattern), layer.dropout1, layer.norm1)
            stream.add_and_normalize(feed_forward(layer, stream.x), layer.dropout2, layer.norm2)
            normed = None
            continue
        if normed is None:
            normed = stream.norm(layer.norm1)
        normed = stream.add_then_norm(self_attention(layer.self_attn, normed, pattern), layer.dropout1, layer.norm2)
        update = feed_forward(layer, normed)
        following = _norm_after(layers, index, final_norm)
        if following is None:
            stream.add(update, layer.dropout2)
            normed = None
        else:
            normed = stream.add_then_norm(update, layer.dropout2, following)
    if final_norm is None:
        return stream.x
    return stream.norm(final_norm) if normed is None else normed


def _norm_after(
    layers: Sequence[nn.TransformerEncoderLayer], index: int, final_norm: nn.LayerNorm | None
) -> nn.LayerNorm | None:
    """The norm that the output of ``layers[index]`` goes through next, besides going on as the residual."""
    if index + 1 == len(layers):
        return final_norm
    return layers[index + 1].norm1 if layers[index + 1].norm_first else None


class ResidualStream:
    """The activations ``x`` that each block adds its update to.

    Where nothing records the computation, results are written over the updates (which the blocks have just made) and
    over ``x`` once it is the stream's own: fresh memory costs more than the arithmetic. Not so with ``owns_updates``
    False: somebody else may keep them.
    """

    def __init__(self, x: Tensor, owns_x: bool, *, owns_updates: bool = True) -> None:
        self.x = x
        self.owns_x = owns_x
        self._in_place = (
            owns_updates
            and not torch.is_grad_enabled()
            and is_eager(x)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def norm(self, norm: nn.LayerNorm) -> Tensor:
        """``norm(x)``."""
        return functional.layer_norm(self.x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def add(self, update: Tensor, dropout: nn.Dropout) -> None:
        """``x = x + dropout(update)``."""
        update = self._promoted(update)
        out = update if self._in_place else None
        self.x = functional.residual_add(update, self.x, dropout_p=dropout.p, training=dropout.training, out=out)
        self.owns_x = True

    def add_and_normalize(self, update: Tensor, dropout: nn.Dropout, norm: nn.LayerNorm) -> None:
        """``x = norm(x + dropout(update))``."""
        update = self._promoted(update)
        self.x = self._add_layer_norm(update, dropout, norm, prenorm=False, out=update if self._in_place else None)
        self.owns_x = True

    def add_then_norm(self, update: Tensor, dropout: nn.Dropout, norm: nn.LayerNorm) -> Tensor:
        """``x = x + dropout(update)``; returns ``norm(x)``."""
        update = self._promoted(update)
        out = (update, self.x if self.owns_x else torch.empty_like(update)) if self._in_place else None
        normed, self.x = self._add_layer_norm(update, dropout, norm, prenorm=True, out=out)
        self.owns_x = True
        return normed

    def _add_layer_norm(
        self,
        update: Tensor,
        dropout: nn.Dropout,
        norm: nn.LayerNorm,
        *,
        prenorm: bool,
        out: Tensor | tuple[Tensor, Tensor] | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return functional.add_layer_norm(
            update,
            self.x,
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_p=dropout.p,
            training=dropout.training,
            prenorm=prenorm,
            out=out,
        )

    def _promoted(self, update: Tensor) -> Tensor:
        """``update`` in the dtype that torch's addition gives the sum: under autocast it comes in a narrower one."""
        if update.dtype == self.x.dtype:
            return update
        return update.to(torch.promote_types(update.dtype, self.x.dtype))
