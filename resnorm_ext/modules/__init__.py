# SPDX-License-Identifier: BSD-3-Clause
"""Modules with the constructors, parameters and masks of their counterparts in ``torch.nn``."""

from .add_layer_norm import AddLayerNorm
from .attention import SelfAttention
from .encoder import TransformerEncoder, TransformerEncoderLayer
from .feed_forward import FeedForward
from .layer_norm import LayerNorm

__all__ = [
    "AddLayerNorm",
    "FeedForward",
    "LayerNorm",
    "SelfAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
