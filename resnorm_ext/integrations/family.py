# SPDX-License-Identifier: BSD-3-Clause
"""The integration of one of transformers' model families."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator

from torch import nn

from ..engine.linear import LinearShape
from ..modules.originals import Originals, forwards
from .looped import announce_stack
from .replace import Finding, Replacement, named_modules, original_class
from .spec import TransformersLayer
from .stack import lasting_reason
from .text_batch import TextModel, packing_hooks
from .varlen import PackedLinear, TextEncoder, embeddings_as_built


class Family:
    """Replaces what a model family is made of by what this package has for it.

    Args:
        layer: how its layers are made.
        replacements: the classes that take the places of their last bases.
        text_encoder: how its text encoder is made, if it has one.
        looped: the class of its model that loops over its layers itself, if it has one.
        left_alone: why a module is left alone, if it is.
    """

    def __init__(
        self,
        layer: TransformersLayer,
        replacements: Collection[type[Replacement]],
        *,
        text_encoder: TextEncoder | None = None,
        looped: type[nn.Module] | None = None,
        left_alone: Callable[[nn.Module], str | None] = lambda _: None,
    ) -> None:
        self.layer, self.text_encoder, self.looped, self.left_alone = layer, text_encoder, looped, left_alone
        if looped is not None:
            for replacement in replacements:
                replacement.looped, replacement.model_originals = looped, forwards(looped)
                names = list(inspect.signature(looped.forward).parameters)
                replacement.mask_position = names.index("attention_mask") - 1  # self is no argument
        self.replacements = {replacement._original: replacement for replacement in replacements}
        # A subclass of a text model packs by a hook.
        self._refused = tuple(each for each, by in self.replacements.items() if not issubclass(by, TextModel))
        # Now, before anybody replaces one for a while.
        self.originals: Originals = layer.originals if text_encoder is None else text_encoder.model_originals

    def find(self, model: nn.Module) -> Iterator[Finding]:
        """The modules of ``model`` that are replaced, and those of their kind that are not."""
        decoders, between = list(self._decoders(model)), self._between(model)
        for name, module in model.named_modules():
            original = original_class(module)
            replacement = PackedLinear if module in between else self.replacements.get(original)
            reason = self.left_alone(module)
            if _is_inside(decoders, name):
                if name in decoders:
                    yield Finding(name, module, None, "a decoder: its attention is causal and may have a cache")
                elif reason is not None:
                    yield Finding(name, module, None, reason)
            elif reason is not None:
                yield Finding(name, module, None, reason)
            elif replacement is not None:
                yield Finding(name, module, replacement, self._lasting_reason(module))
            elif isinstance(module, self._refused):
                yield Finding(name, module, None, "a subclass, which may compute something else")

    def hooks(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
        """The modules of ``model`` that get a forward pre-hook, and the hook."""
        if self.text_encoder is not None:
            yield from packing_hooks(model, self.text_encoder.model)
        if self.looped is not None:
            yield from ((module, announce_stack) for _, module in named_modules(model, self.looped))

    def linear_shapes(self, model: nn.Module) -> Iterator[LinearShape]:
        """Of the products that inference through the layers in ``model`` has on the CPU."""
        for _, layer in named_modules(model, self.layer.types[0]):
            if self.layer.lasting_reason(layer) is None and all(
                tensor.is_cpu for tensor in self.layer.parameters(layer) if tensor is not None
            ):
                yield from self.layer.shapes(layer)

    def _decoders(self, model: nn.Module) -> Iterator[str]:
        if self.text_encoder is not None:
            for name, module in named_modules(model, self.text_encoder.model):
                if getattr(module.config, "is_decoder", False):
                    yield name

    def _between(self, model: nn.Module) -> set[nn.Module]:
        """What lies between embeddings and encoder, and may be replaced."""
        if self.text_encoder is None:
            return set()
        models = [module for _, module in named_modules(model, self.text_encoder.model)]
        children = (each._modules.get(name) for each in models for name in self.text_encoder.between)
        return {child for child in children if child is not None and original_class(child) is nn.Linear}

    def _lasting_reason(self, module: nn.Module) -> str | None:
        """What keeps ``module`` from inference on its weights at every call, as it is now."""
        if isinstance(module, self.layer.types[0]) and self.text_encoder is None:
            return lasting_reason(self.layer, [module], name="the layer")
        if self.text_encoder is None:
            return None
        if isinstance(module, self.text_encoder.encoder._original):
            config = getattr(module, "config", None)
            return lasting_reason(self.layer, module.layer, [] if config is None else [config])
        if isinstance(module, self.text_encoder.embeddings[0]) and not embeddings_as_built(module, self.text_encoder):
            return "embeddings have hooks or are not as they were built"
        return None


def _is_inside(parents: list[str], name: str) -> bool:
    return any(not parent or name == parent or name.startswith(f"{parent}.") for parent in parents)
