# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's pre-norm layers, each replaced for itself: whether a call may take the way of inference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .._extension import extension
from ..engine.linear import LinearShape
from .layer_kind import LayerKind, linear_shapes, parts_as_built
from .prepared import prepared_layers
from .replace import Finding, original_class
from .transformers import captures_outputs, implementation_obstacle, mode_obstacle

_log = logging.getLogger(__name__)


def weights_for_inference(
    layer: nn.Module, kind: LayerKind, config: PreTrainedConfig, x: Tensor, arguments: dict[str, Any]
) -> extension.LayerWeights | None:
    """Those of ``layer`` where its call on ``x`` with these further arguments is inference on its weights alone.

    None where anything about the call or the layer asks for the original computation.
    """
    if torch.compiler.is_compiling():
        return None
    weights = _weights_or_obstacle(layer, kind, config, x, arguments)
    if isinstance(weights, str):
        _log.debug("%s: original computation, because %s", type(layer).__name__, weights)
        return None
    _log.debug("%s: fused", type(layer).__name__)
    return weights


def _weights_or_obstacle(
    layer: nn.Module, kind: LayerKind, config: PreTrainedConfig, x: Tensor, arguments: dict[str, Any]
) -> extension.LayerWeights | str:
    if captures_outputs():
        return "hidden states or attention weights are asked for"
    obstacle = mode_obstacle(x) or implementation_obstacle(config, kind.eager_attention)
    if obstacle is not None:
        return obstacle
    if x.dim() != 3 or not x.numel():
        return f"the input is of shape {tuple(x.shape)}"
    for name, value in arguments.items():
        if value is not None and value is not False:
            return f"{name} is given"
    layers = prepared_layers(layer, [layer], kind, x.dtype, "the layer")
    return layers if isinstance(layers, str) else layers[0]


class PreNormIntegration:
    """The integration of a model whose layers are of ``kind``.

    Args:
        replacement: of the layers.
        config_of: that of a layer.
        exception: why a layer is left alone, if it is.
    """

    def __init__(
        self,
        kind: LayerKind,
        replacement: type[nn.Module],
        config_of: Callable[[nn.Module], PreTrainedConfig],
        exception: Callable[[nn.Module], str | None] = lambda _: None,
    ) -> None:
        self.kind, self.replacement, self.config_of, self.exception = kind, replacement, config_of, exception

    def find(self, model: nn.Module) -> Iterator[Finding]:
        original = self.replacement.__bases__[0]
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
        return implementation_obstacle(self.config_of(layer), self.kind.eager_attention)
