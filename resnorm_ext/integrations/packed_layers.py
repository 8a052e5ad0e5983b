# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's post-norm encoders on packed batches: whether a call may take this path, and the path."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .._extension import extension
from ..engine.encode import encode_post_norm
from ..engine.packing import unpack
from .layer_kind import LayerKind, parts_as_built
from .prepared import prepared_layers
from .transformers import (
    PackedBatch,
    attention_obstacle,
    captures_outputs,
    hides_first_position,
    key_mask_of,
    mode_obstacle,
    packing_of_mask,
)

_log = logging.getLogger(__name__)

WITHOUT_EFFECT = ("cache_position", "return_dict")  # on what an encoder computes


def encoder_obstacle(encoder: nn.Module, kind: LayerKind) -> str | None:
    """What about its modules keeps ``encoder`` from the packed path at present."""
    for index, layer in enumerate(encoder.layer):
        parts = parts_as_built(layer, kind)
        if isinstance(parts, str):
            return f"layer.{index}{parts}"
    return None


def packed_batch_of_encoder(
    encoder: nn.Module,
    kind: LayerKind,
    config: PreTrainedConfig | None,
    x: Tensor,
    attention_mask: Tensor | None,
    arguments: dict[str, Any],
) -> PackedBatch | str:
    """What ``encoder``'s call on padded hidden states packs; or why it cannot."""
    others = {name: value for name, value in arguments.items() if name not in ("position_ids", *WITHOUT_EFFECT)}
    layers = layers_to_run(encoder, kind, config, x, x.dtype, others)
    if isinstance(layers, str):
        return layers
    key_mask = None
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool and config._attn_implementation != "sdpa":
            return "the attention adds its mask to the scores, and this one is bool"
        key_mask = key_mask_of(attention_mask, *x.shape[:2])
        if key_mask is None:
            return "the attention mask does not only hide keys"
        if hides_first_position(key_mask):
            return "position 0 is hidden, and a pooler may read it"
    return PackedBatch(packing_of_mask(key_mask, *x.shape[:2]), layers)


def layers_to_run(
    encoder: nn.Module,
    kind: LayerKind,
    config: PreTrainedConfig | None,
    x: Tensor,
    dtype: torch.dtype,
    arguments: dict[str, Any],
) -> list[extension.LayerWeights] | str:
    """``encoder``'s layers for a packed call on ``x`` with these further arguments; or what stands against it."""
    if captures_outputs():
        return "hidden states or attention weights are asked for"
    if config is None:
        return "there is no layer as it was built"
    obstacle = mode_obstacle(x) or attention_obstacle(config, kind.eager_attention)
    if obstacle is not None:
        return obstacle
    if x.is_floating_point() and x.dtype != dtype:
        return f"the input is {x.dtype}, not {dtype}"
    for name, value in arguments.items():
        if value is not None and value is not False:
            return f"{name} is given"
    return prepared_layers(encoder, encoder.layer, kind, dtype) or "there is no layer"


def encode_packed(encoder: nn.Module, tokens: Tensor, batch: PackedBatch) -> Tensor:
    """The last layer's output for the packed ``tokens``, padded again."""
    packing = batch.packing
    _log.debug(
        "%s: packed, %d tokens of %d x %d", type(encoder).__name__, len(tokens), packing.batch_size, packing.length
    )
    return unpack(encode_post_norm(tokens, packing.cu_seqlens, batch.layers), packing)


def log_obstacle(encoder: nn.Module, obstacle: str) -> None:
    _log.debug("%s: original computation, because %s", type(encoder).__name__, obstacle)
