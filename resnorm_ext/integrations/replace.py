# SPDX-License-Identifier: BSD-3-Clause
"""Replacing modules of one model instance: by ``__class__``, so that nothing but what ``forward`` does changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import nn

from ..engine.linear import LinearShape

# On the instance: (original, replacement); and what inference has made of a module's weights.
_CLASSES, PREPARED = "_resnorm_classes", "_resnorm_prepared"


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


class Integration(Protocol):
    """What ``accelerate`` asks of a library's models."""

    def find(self, model: nn.Module) -> Iterator[Finding]:
        """The modules of ``model`` that are replaced, and those of their kind that are not."""

    def hooks(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
        """The modules of ``model`` that get a forward pre-hook, and the hook."""

    def linear_shapes(self, model: nn.Module) -> Iterator[LinearShape]:
        """Of the linear layers that inference multiplies by itself."""


class Unusable:
    """Stands for the integration of a library of which another release is installed: finds its modules, and leaves them
    alone."""

    def __init__(self, library: str, error: ImportError) -> None:
        self.library, self.reason = library, f"this release of its library is not supported ({error})"

    def find(self, model: nn.Module) -> Iterator[Finding]:
        for name, module in model.named_modules():
            if type(module).__module__ == self.library:
                yield Finding(name, module, None, self.reason)

    def hooks(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
        return iter(())

    def linear_shapes(self, model: nn.Module) -> Iterator[LinearShape]:
        return iter(())


def replace(module: nn.Module, replacement: type[nn.Module]) -> None:
    """Makes ``module`` a ``replacement``, until ``put_back``."""
    setattr(module, _CLASSES, (type(module), replacement))
    module.__class__ = replacement


def put_back(module: nn.Module) -> None:
    """Undoes ``replace``, if that was done. A class that the module was given since then stays, on the original."""
    if not is_replaced(module):
        return
    original, replacement = module.__dict__.pop(_CLASSES)
    current = type(module)
    if current is replacement:
        module.__class__ = original
    elif current.__bases__ == (replacement,):  # as torch.nn.utils.parametrize makes them
        members = {name: value for name, value in vars(current).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(current.__name__, (original,), members)


def forget_prepared(module: nn.Module) -> None:
    """Drops what inference has made of ``module``'s weights."""
    module.__dict__.pop(PREPARED, None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` before ``replace``."""
    return module.__dict__[_CLASSES][0] if is_replaced(module) else type(module)


def is_replaced(module: nn.Module) -> bool:
    return _CLASSES in module.__dict__


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
