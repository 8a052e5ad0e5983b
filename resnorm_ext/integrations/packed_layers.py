# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's post-norm encoders on packed batches: whether a call may take this path, and the path."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..engine.encode import encode
from ..engine.packing import unpack
from ..modules.calls import record
from .layer_kind import LayerKind, parts_as_built
from .prepared import PreparedLayers, prepared_layers
from .transformers import (
    PackedBatch,
    attention_obstacle,
    captures_outputs,
    hides_first_position,
    key_mask_of,
    mode_obstacle,
    packing_of_mask,
)

# The heads that are running, each with whether its result reads padded positions (heads.py).
reads_padding: ContextVar[tuple[tuple[int, bool], ...]] = ContextVar("reads_padding", default=())


def encoder_obstacle(encoder: nn.Module, configs: list[PreTrainedConfig], kind: LayerKind) -> str | None:
    """What about its modules, its ``configs`` and those of its layers keeps ``encoder`` from the packed path."""
    changed = kind.originals.reason()
    if changed is not None:
        return changed
    configs = list(configs)
    for index, layer in enumerate(encoder.layer):
        parts = parts_as_built(layer, kind)
        if isinstance(parts, str):
            return f"layer.{index}{parts}"
        configs.append(parts[kind.attention].config)
    return attention_obstacle(configs, kind.eager_attention)


def packed_batch_of_encoder(
    encoder: nn.Module,
    kind: LayerKind,
    config: PreTrainedConfig | None,
    x: Tensor,
    attention_mask: Tensor | None,
    arguments: dict[str, Any],
) -> PackedBatch | str:
    """What ``encoder``'s call on padded hidden states packs; or why it cannot."""
    layers = layers_to_run(encoder, kind, config, x, x.dtype, arguments)
    if isinstance(layers, str):
        return layers
    key_mask = None
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool and config._attn_implementation != "sdpa":
            return "the attention adds its mask to the scores, and this one is bool"
        key_mask = key_mask_of(attention_mask, *x.shape[:2])
        if key_mask is None:
            return "the attention mask does not only hide keys"
    return padding_obstacle(encoder, key_mask) or PackedBatch(layers, packing_of_mask(key_mask, *x.shape[:2]))


def padding_obstacle(encoder: nn.Module, key_mask: Tensor | None) -> str | None:
    """Why positions that ``key_mask`` hides are to be computed all the same."""
    if key_mask is None:
        return None
    if hides_first_position(key_mask, of_any_sequence=encoder.padding != "skip"):
        return "position 0 is hidden, as by padding on the left, and may be read"
    if encoder.padding == "compute" and not key_mask.all():
        return "padding is to be computed"
    if encoder.padding == "auto" and any(reads for _, reads in reads_padding.get()) and not key_mask.all():
        return "the loss reads padded positions"
    return None


def layers_to_run(
    encoder: nn.Module,
    kind: LayerKind,
    config: PreTrainedConfig | None,
    x: Tensor,
    dtype: torch.dtype,
    arguments: dict[str, Any],
) -> PreparedLayers | str:
    """``encoder``'s layers for a packed call on ``x`` with these further arguments; or what stands against it."""
    if captures_outputs():
        return "hidden states or attention weights are asked for"
    if config is None:
        return "there is no layer as it was built"
    obstacle = mode_obstacle(x, encoder.model_kind().originals) or attention_obstacle([config], kind.eager_attention)
    if obstacle is not None:
        return obstacle
    if x.is_floating_point() and x.dtype != dtype:
        return f"the input is {x.dtype}, not {dtype}"
    for name, value in arguments.items():
        if value is not None and value is not False and name in encoder.model_kind().names_read:
            return f"{name} is given"
    if len(encoder.layer) == 0:
        return "there is no layer"
    layers = prepared_layers(encoder, encoder.layer, kind, x, dtype)
    if isinstance(layers, str):
        return layers
    if any(each is not config for each in layers.configs):
        return attention_obstacle([config, *layers.configs], kind.eager_attention) or layers
    return layers


def encode_packed(encoder: nn.Module, tokens: Tensor, batch: PackedBatch) -> Tensor:
    """The last layer's output for the packed ``tokens``, padded again."""
    record(encoder, "packed")
    layers, packing = batch
    x = tokens.resolve_neg().to(layers.precision.stream)
    return unpack(encode(x, packing.cu_seqlens, layers.layers).to(tokens.dtype), packing)
