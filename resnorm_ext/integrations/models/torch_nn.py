# SPDX-License-Identifier: BSD-3-Clause
"""``torch.nn``'s norms and Transformer encoder: their subclasses in this package take their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from ... import modules
from ...engine.linear import LinearShape
from ...modules.encoder import encoder_reason
from ...modules.encoder_stack import LAYER, layer_reason
from ..replace import Finding, named_modules, original_class

_REPLACEMENTS = {
    nn.LayerNorm: modules.LayerNorm,
    nn.RMSNorm: modules.RMSNorm,
    nn.TransformerEncoderLayer: modules.TransformerEncoderLayer,
    nn.TransformerEncoder: modules.TransformerEncoder,
}


def find(model: nn.Module) -> Iterator[Finding]:
    """The modules of ``model`` that are replaced, and those of their kind that are not."""
    attentions = {id(layer.self_attn) for _, layer in _encoder_layers(model)}
    others = {id(layer.self_attn) for _, layer in named_modules(model, nn.TransformerEncoderLayer)} - attentions
    for name, module in model.named_modules():
        original = original_class(module)
        if original is nn.MultiheadAttention:
            if id(module) in attentions:
                yield Finding(name, module, modules.SelfAttention)
            elif id(module) in others:
                yield Finding(name, module, None, "part of a subclass of nn.TransformerEncoderLayer")
            else:
                yield Finding(name, module, None, "outside an encoder layer its key and value may be another's")
        elif original in _REPLACEMENTS:
            yield Finding(name, module, _REPLACEMENTS[original], _lasting_reason(module))
        elif isinstance(module, nn.TransformerDecoder | nn.TransformerDecoderLayer):
            yield Finding(name, module, None, "a decoder has cross-attention")
        elif isinstance(module, tuple(_REPLACEMENTS)) and not original.__module__.startswith(modules.__name__):
            kind = next(base for base in _REPLACEMENTS if isinstance(module, base))
            yield Finding(name, module, None, f"a subclass of nn.{kind.__name__}, which may compute something else")


def _lasting_reason(module: nn.Module) -> str | None:
    """What keeps ``module`` from its fused path at every call, as it is now."""
    if isinstance(module, nn.TransformerEncoder):
        return encoder_reason(module)
    return layer_reason(module) if isinstance(module, nn.TransformerEncoderLayer) else None


def hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """The modules of ``model`` that get a forward pre-hook, and the hook: none."""
    return iter(())


def linear_shapes(model: nn.Module) -> Iterator[LinearShape]:
    """Of the linear layers of the encoder layers in ``model``."""
    for _, layer in _encoder_layers(model):
        if layer_reason(layer) is None and layer.linear1.weight.is_cpu:
            yield from LAYER.shapes(layer)


def _encoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in named_modules(model, nn.TransformerEncoderLayer):
        if original_class(layer) in (nn.TransformerEncoderLayer, modules.TransformerEncoderLayer):
            yield name, layer
