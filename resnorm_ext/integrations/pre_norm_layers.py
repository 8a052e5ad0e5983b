# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's pre-norm layers, each replaced for itself: whether a call may take the way of inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.linear import LinearShape
from ..modules.calls import record
from .layer_kind import LayerKind, linear_shapes, parts_as_built
from .prepared import PreparedLayers, prepared_layers
from .replace import Finding, Replacement, original_class
from .transformers import attention_obstacle, captures_outputs, mode_obstacle


def layer_for_inference(
    layer: nn.Module, kind: LayerKind, x: Tensor, arguments: dict[str, Any]
) -> PreparedLayers | None:
    """The prepared ``layer`` where its call on ``x`` with these further arguments is inference on its weights alone.

    None where anything about the call or the layer asks for the original computation.
    """
    if torch.compiler.is_compiling():
        return None
    prepared = _layer_or_obstacle(layer, kind, x, arguments)
    if isinstance(prepared, str):
        record(layer, "original", prepared)
        return None
    record(layer, "fused")
    return prepared


def _layer_or_obstacle(layer: nn.Module, kind: LayerKind, x: Tensor, arguments: dict[str, Any]) -> PreparedLayers | str:
    if captures_outputs():
        return "hidden states or attention weights are asked for"
    obstacle = mode_obstacle(x, kind.originals)
    if obstacle is not None:
        return obstacle
    if x.dim() != 3 or not x.numel():
        return f"the input is of shape {tuple(x.shape)}"
    for name, value in arguments.items():
        if value is not None and value is not False and name in kind.names_read:
            return f"{name} is given"
    prepared = prepared_layers(layer, [layer], kind, x, x.dtype, "the layer")
    if isinstance(prepared, str):
        return prepared
    return attention_obstacle(prepared.configs, kind.eager_attention, is_causal=kind.is_causal) or prepared


class PreNormIntegration:
    """The integration of a model whose layers are of ``kind``.

    Args:
        replacement: of the layers.
        exception: why a layer is left alone, if it is.
    """

    def __init__(
        self,
        kind: LayerKind,
        replacement: type[Replacement],
        exception: Callable[[nn.Module], str | None] = lambda _: None,
    ) -> None:
        self.kind, self.replacement, self.exception = kind, replacement, exception
        self.originals = kind.originals  # now, before anybody replaces one for a while

    def find(self, model: nn.Module) -> Iterator[Finding]:
        original = self.replacement._original
        for name, module in model.named_modules():
            if not isinstance(module, original):
                continue
            if original_class(module) is not original:
                yield Finding(name, module, None, "a subclass, which may compute something else")
            elif (reason := self.exception(module)) is not None:
                yield Finding(name, module, None, reason)
            else:
                yield Finding(name, module, self.replacement, self._lasting_obstacle(module))

    def hooks(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
        return iter(())

    def linear_shapes(self, model: nn.Module) -> Iterator[LinearShape]:
        return linear_shapes(model, self.kind)

    def _lasting_obstacle(self, layer: nn.Module) -> str | None:
        """What keeps ``layer`` from inference on its weights at every call, as it is now."""
        parts = parts_as_built(layer, self.kind)
        if isinstance(parts, str):
            return f"the layer{parts}"
        changed = self.kind.originals.reason()
        if changed is not None:
            return changed
        config = parts[self.kind.attention].config
        return attention_obstacle([config], self.kind.eager_attention, is_causal=self.kind.is_causal)
