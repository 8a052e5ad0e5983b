# SPDX-License-Identifier: BSD-3-Clause
"""Modules with the constructors, parameters and masks of their counterparts in ``torch.nn``."""

from .attention import SelfAttention
from .encoder import TransformerEncoder, TransformerEncoderLayer
from .feed_forward import FeedForward
from .norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "FeedForward",
    "LayerNorm",
    "RMSNorm",
    "SelfAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
