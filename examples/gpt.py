# SPDX-License-Identifier: BSD-3-Clause
"""GPT-2 (Radford et al. 2019) of this package's modules, for sequences that are packed: nothing is padded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from resnorm_ext import AddRMSNorm, FeedForward, LayerNorm, RMSNorm, TransformerEncoder, TransformerEncoderLayer
from resnorm_ext.functional import packed_attention

EPS = 1e-5


class GPT(nn.Module):
    """Embeddings of tokens and positions, pre-norm causal layers, and a head that is tied to the first.

    Args:
        vocabulary, context: number of tokens and of positions.
        layers, heads, width: of the Transformer.
        dropout: of embeddings, attention weights and the layers' updates.
        rms: RMSNorm in the place of LayerNorm.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        layers: int,
        heads: int,
        width: int,
        dropout: float = 0.0,
        rms: bool = False,
    ) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = (RMSNormLayers if rms else layer_norm_layers)(layers, heads, width, dropout)
        self.apply(_initialize)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("out_proj.weight", "linear2.weight")):  # what each layer adds to the residual
                    parameter /= math.sqrt(2 * layers)

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> CausalLMOutput:
        """Logits of the token after each, and their mean cross-entropy with ``labels``.

        Args:
            input_ids, labels: ``(tokens,)``, the sequences one after another; labels of -100 are ignored.
            cu_seqlens: int32 ``(sequences + 1,)``, where each sequence begins and the last one ends.
            attention_mask: not read, since every token is a real one.
        """
        logits = F.linear(self.hidden_states(input_ids, cu_seqlens), self.tokens.weight).float()
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return CausalLMOutput(loss, logits)

    def hidden_states(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """``(tokens, width)``, after the last norm."""
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
        positions = torch.arange(len(input_ids), device=input_ids.device) - starts
        x = self.dropout(self.tokens(input_ids) + self.positions(positions))
        return self.layers(x, is_causal=True, cu_seqlens=cu_seqlens)


def layer_norm_layers(layers: int, heads: int, width: int, dropout: float) -> TransformerEncoder:
    layer = TransformerEncoderLayer(
        width, heads, 4 * width, dropout, nn.GELU("tanh"), EPS, batch_first=True, norm_first=True
    )
    layer.dropout.p = 0.0  # of activations, which GPT-2 keeps
    return TransformerEncoder(layer, layers, LayerNorm(width, EPS), enable_nested_tensor=False)


class RMSNormLayers(nn.Module):
    """The same with RMSNorm. The encoder takes such norms too, but then calls its modules one by one, with torch's
    dropout; here each norm but the first is one operator with the addition and dropout before it."""

    def __init__(self, layers: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, EPS)
        self.layers = nn.ModuleList(RMSNormLayer(heads, width, dropout) for _ in range(layers))

    def forward(self, x: Tensor, is_causal: bool, cu_seqlens: Tensor) -> Tensor:
        normed = self.norm(x)
        for layer in self.layers:
            normed, x = layer(normed, x, is_causal, cu_seqlens)
        return normed


class RMSNormLayer(nn.Module):
    """Attention, feed-forward, and the norm after each: the second is the next layer's first, or the last one."""

    def __init__(self, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.attention_norm = AddRMSNorm(width, EPS, dropout_p=dropout, prenorm=True)
        self.feed_forward = FeedForward(width, 4 * width, dropout=0.0, activation=nn.GELU("tanh"))
        self.feed_forward_norm = AddRMSNorm(width, EPS, dropout_p=dropout, prenorm=True)

    def forward(self, normed: Tensor, x: Tensor, is_causal: bool, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        qkv = self.in_proj(normed).unflatten(-1, (3, self.heads, -1))
        context = packed_attention(
            qkv, cu_seqlens, causal=is_causal, dropout_p=self.dropout, training=self.training
        ).flatten(1)
        normed, x = self.attention_norm(self.out_proj(context), x)
        return self.feed_forward_norm(self.feed_forward(normed), x)


def _initialize(module: nn.Module) -> None:
    """As GPT-2's, but for what is scaled by the number of layers."""
    for name, parameter in module.named_parameters(recurse=False):
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:  # and not a norm's
            nn.init.normal_(parameter, std=0.02)
