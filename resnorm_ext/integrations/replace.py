# SPDX-License-Identifier: BSD-3-Clause
"""Replacing modules of one model instance: by ``__class__``, so that nothing but what ``forward`` does changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

_ORIGINAL = "_resnorm_original_class"  # on the instance: what restore() puts back


class Finding(NamedTuple):
    """A module that an integration knows.

    Attributes:
        name: in the model.
        replacement: the subclass of the module's class that takes its place; None where it is left alone.
        reason: why it is left alone, or what keeps the replacement from its fast path.
    """

    name: str
    module: nn.Module
    replacement: type[nn.Module] | None
    reason: str | None = None


def replace(module: nn.Module, replacement: type[nn.Module]) -> None:
    """Makes ``module`` a ``replacement``, until ``put_back``."""
    setattr(module, _ORIGINAL, type(module))
    module.__class__ = replacement


def put_back(module: nn.Module) -> None:
    """Undoes ``replace``, if that was done."""
    original = original_class(module)
    if original is not type(module):
        delattr(module, _ORIGINAL)
        module.__class__ = original


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` before ``replace``."""
    return module.__dict__.get(_ORIGINAL, type(module))


def is_replaced(module: nn.Module) -> bool:
    return _ORIGINAL in module.__dict__


def add_pre_hook(module: nn.Module, hook: Callable) -> None:
    """Registers the with_kwargs forward pre-hook ``hook``, once. A function of a module, so that it can be pickled."""
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def remove_pre_hook(module: nn.Module, hook: Callable) -> None:
    """Undoes ``add_pre_hook``, also in a copy of the module."""
    for key in [key for key, registered in module._forward_pre_hooks.items() if registered is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def named_modules(model: nn.Module, *types: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Those modules of ``model`` that are instances of ``types``."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, types))
