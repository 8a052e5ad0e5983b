# SPDX-License-Identifier: BSD-3-Clause
"""Replacing modules of one model instance: by ``__class__``, so that nothing but what ``forward`` does changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import nn

from ..engine.linear import LinearShape
from ..engine.prepared import PREPARED
from ..modules.calls import Model, forget_record, record, record_from_now
from ..modules.originals import Originals, forwards
from ..modules.padding import forget_choice

_CLASSES = "_resnorm_classes"  # on the instance: (original, replacement)
_FUSED = forwards(nn.LayerNorm, nn.Dropout) + Originals(
    (nn.Module, "__call__"), (nn.Module, "_call_impl"), (F, "layer_norm"), (F, "dropout")
)


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


class Replacement:
    """A class that takes the place of its last base, a library's.

    Attributes:
        chooses_path: whether its calls are of the kind that ``report`` tells about.
    """

    chooses_path = False
    _original: type[nn.Module]
    _originals: Originals

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        original = cls.__bases__[-1]
        if original is not nn.Module and issubclass(original, nn.Module) and not issubclass(original, Replacement):
            cls._original, cls._originals = original, _FUSED + forwards(original)


def original_forward(module: nn.Module, owner: type[Replacement]) -> Callable[..., Any] | None:
    """The forward of the class whose place ``module``'s class takes, where it is to run instead of ``owner``'s; else
    None.

    It is where a function that ``owner``'s stands for has been replaced, and where ``module`` has been restored, but
    somebody has kept its forward.
    """
    if not isinstance(module, owner):
        return MethodType(type(module).forward, module)
    reason = type(module)._originals.reason()
    if reason is None:
        return None
    if module.chooses_path:
        record(module, "original", reason)
    return MethodType(type(module)._original.forward, module)


class Integration(Protocol):
    """What ``accelerate`` asks of a library's models."""

    def find(self, model: nn.Module) -> Iterator[Finding]:
        """The modules of ``model`` that are replaced, and those of their kind that are not."""

    def hooks(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
        """The modules of ``model`` that get a forward pre-hook, and the hook."""

    def linear_shapes(self, model: nn.Module) -> Iterator[LinearShape]:
        """Of the linear layers that inference multiplies by itself."""


class Unusable:
    """Stands for the integrations of libraries of which another release is installed: finds the outermost of their
    modules, and leaves it alone."""

    def __init__(self, libraries: list[str], reason: str) -> None:
        self.libraries, self.reason = libraries, reason

    def find(self, model: nn.Module) -> Iterator[Finding]:
        for name, module in model.named_modules():
            if type(module).__module__ in self.libraries:
                yield Finding(name, module, None, self.reason)
                return

    def hooks(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
        return iter(())

    def linear_shapes(self, model: nn.Module) -> Iterator[LinearShape]:
        return iter(())


def replace(module: nn.Module, replacement: type[nn.Module], model: Model) -> None:
    """Makes ``module`` a ``replacement``, a part of ``model``, until ``put_back``."""
    setattr(module, _CLASSES, (type(module), replacement))
    module.__class__ = replacement
    record_from_now(module, model)


def class_put_back(module: nn.Module, name: str) -> type[nn.Module]:
    """The class that ``module``, called ``name``, has without its replacement: the original, or what others have made
    of the class since then, on the original.

    Raises RuntimeError where that cannot be told.
    """
    original, replacement = module.__dict__[_CLASSES]
    current = type(module)
    if current is replacement:
        return original
    if replacement not in current.__mro__:
        return current
    if replacement in current.__bases__:  # as parametrize and fully_shard make them
        bases = tuple(original if base is replacement else base for base in current.__bases__)
        members = {key: value for key, value in vars(current).items() if key not in ("__dict__", "__weakref__")}
        return type(current.__name__, bases, members)
    raise RuntimeError(
        f"cannot restore {name or 'the model'}: its class {current.__qualname__} inherits from "
        f"{replacement.__qualname__} through another class. Take that class off first."
    )


def put_back(module: nn.Module, class_: type[nn.Module]) -> None:
    """Undoes ``replace``, with what ``class_put_back`` gave."""
    _, replacement = module.__dict__.pop(_CLASSES)
    module.__class__ = class_
    forget_record(module)
    forget_choice(module)
    # Whoever wraps a forward keeps the method that was there, and puts it on the instance when the wrapper goes.
    for name, value in list(module.__dict__.items()):
        if isinstance(value, MethodType) and value.__self__ is module:
            if getattr(replacement, value.__name__, None) is value.__func__:
                module.__dict__[name] = MethodType(getattr(class_, value.__name__), module)


def forget_prepared(module: nn.Module) -> None:
    """Drops what inference has made of ``module``'s weights."""
    module.__dict__.pop(PREPARED, None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` before ``replace``."""
    return module.__dict__[_CLASSES][0] if is_replaced(module) else type(module)


def is_replaced(module: nn.Module) -> bool:
    return _CLASSES in module.__dict__


def add_hooks(module: nn.Module, before: Callable, after: Callable) -> None:
    """Registers ``before``, with_kwargs, around the forward of ``module``, and ``after``, also where that raises."""
    if before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, always_call=True)


def remove_hooks(module: nn.Module, before: Callable, after: Callable) -> None:
    """Undoes ``add_hooks``, also in a copy of the module."""
    remove_pre_hook(module, before)
    for key in [key for key, registered in module._forward_hooks.items() if registered is after]:
        del module._forward_hooks[key]
        module._forward_hooks_always_called.pop(key, None)


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
