# SPDX-License-Identifier: BSD-3-Clause
"""The Transformer layers of Hugging Face's models."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import CodeType, ModuleType
from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from ..engine.spec import LayerSpec
from ..modules.originals import COMMON, Originals, forwards
from .eligibility import is_as_built

_GELU = F.gelu  # as it was when this package was imported


@dataclass(frozen=True)
class TransformersLayer(LayerSpec):
    """A layer of transformers."""

    @cached_property
    def library(self) -> ModuleType:
        """The module that defines it."""
        return sys.modules[self.types[0].__module__]

    @cached_property
    def eager_attention(self) -> Callable:
        """The module's own attention function."""
        return self.library.eager_attention_forward

    def is_as_built(self, module: nn.Module | None, *types: type[nn.Module]) -> bool:
        return is_as_built(module, *types)

    def activation_name(self, function: Any) -> str | None:
        if self.is_as_built(function, GELUActivation) and function.act in (_GELU, function._gelu_python):
            return "gelu"
        if self.is_as_built(function, NewGELUActivation):
            return "gelu_tanh"
        return super().activation_name(function)

    @cached_property
    def originals(self) -> Originals:
        """What inference on a layer's weights stands for."""
        types = _originals_of(*self.types, *(each for types in self.all_parts.values() for each in types))
        places = [(self.library, name) for name in ("eager_attention_forward", "apply_chunking_to_forward")]
        places += [(GradientCheckpointingLayer, "__call__")]
        for module, method in self.methods:
            places.append((_originals_of(*(self.all_parts[module] if module else self.types))[0], method))
        places = [(owner, name) for owner, name in places if hasattr(owner, name)]
        return COMMON + forwards(*types, GELUActivation, NewGELUActivation) + Originals(*places)

    @cached_property
    def names_read(self) -> frozenset[str]:
        """The names of arguments that a layer's forward, its attention's or an attention function does anything
        with."""
        around = [types for name, types in self.parts.items() if f"{self.attention}.".startswith(f"{name}.")]
        modules = _originals_of(*self.types, *(each for types in around for each in types))
        functions = [each.forward for each in modules] + [sdpa_attention_forward, self.eager_attention]
        return frozenset().union(*map(names_read_by, functions))


def _originals_of(*types: type[nn.Module]) -> list[type[nn.Module]]:
    """Those of ``types`` that are not this package's."""
    package = __name__.partition(".")[0]
    return [each for each in types if each.__module__.partition(".")[0] != package]


def names_read_by(function: Callable) -> frozenset[str]:
    """The arguments by name that ``function`` takes, and every string in it, by which it may read others."""
    function = inspect.unwrap(function)
    parameters = inspect.signature(function).parameters.values()
    named = {each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
    return frozenset(named | _strings_of(function.__code__))


def _strings_of(code: CodeType) -> set[str]:
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            strings |= _strings_of(constant)
    return strings
