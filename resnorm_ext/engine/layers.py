# SPDX-License-Identifier: BSD-3-Clause
"""What inference needs of a Transformer layer (Vaswani et al. 2017), however a library has built it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .linear import PreparedLinear


class Norm(NamedTuple):
    """A layer norm over the last dimension."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class LayerWeights(NamedTuple):
    """The weights of one layer of self-attention and feed-forward.

    Attributes:
        scale: what attention scores are multiplied by.
        qkv: queries, keys and values, each ``num_heads * head_dim`` wide, side by side.
        attention_norm, feed_forward_norm: follow their block's residual add in a post-norm layer, and come before the
            block in a pre-norm one.
        activation: the feed-forward's, by name as in ``functional.linear``.
    """

    num_heads: int
    scale: float
    qkv: PreparedLinear
    attention_output: PreparedLinear
    attention_norm: Norm
    intermediate: PreparedLinear
    activation: str
    output: PreparedLinear
    feed_forward_norm: Norm

    def uses_onednn(self) -> bool:
        linears = (self.qkv, self.attention_output, self.intermediate, self.output)
        return any(linear.backend == "onednn" for linear in linears)
