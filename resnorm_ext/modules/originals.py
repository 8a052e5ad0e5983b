# SPDX-License-Identifier: BSD-3-Clause
"""Whether a forward of this package may stand for the one whose place it takes.

It computes what the original's forward would by calling a handful of functions. Who has put others in their place
(``nn.LayerNorm.forward = ...``, ``F.scaled_dot_product_attention = ...``, a ``TorchFunctionMode``) wants those, so the
original's forward, which calls them, is what runs for as long as they are there.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._device import DeviceContext

from ..build.extension import extension

Place = tuple[ModuleType | type, str]


class Originals:
    """The functions of libraries that some computation stands for, each where its library looks it up."""

    def __init__(self, *places: Place) -> None:
        places = tuple(dict.fromkeys(places))
        self._owners = tuple(owner for owner, _ in places)
        self._names = tuple(name for _, name in places)
        # What is not the library's own now, of a library that was imported and changed before this package, never will.
        self._values = tuple(_librarys_own(owner, name, getattr(owner, name, None)) for owner, name in places)

    def __add__(self, other: Originals) -> Originals:
        return Originals(*self._places(), *other._places())

    def reason(self) -> str | None:
        """Why the original's forward is to run, whatever the module: a function of its library has been replaced, or a
        mode watches them. None where neither."""
        if torch.compiler.is_compiling():  # which has a mode of its own
            index = self._first_changed_while_traced()
        else:
            index = extension.first_changed(self._owners, self._names, self._values)
        if index == -1 or (index == -2 and not has_function_mode()):
            return None
        if index == -2:
            return "a TorchFunctionMode is active"
        owner, name = self._owners[index], self._names[index]
        return f"{owner.__qualname__ if isinstance(owner, type) else owner.__name__}.{name} has been replaced"

    def _first_changed_while_traced(self) -> int:
        for index, (owner, name, value) in enumerate(zip(self._owners, self._names, self._values, strict=True)):
            if getattr(owner, name, None) is not value and not (name == "__call__" and _is_traced_by_fx()):
                return index
        return -1

    def _places(self) -> list[Place]:
        return list(zip(self._owners, self._names, strict=True))


def _is_traced_by_fx() -> bool:
    """Whether torch.fx has its own ``__call__`` in the place of modules', as while torch.export traces."""
    return not torch.compiler.is_dynamo_compiling()


class _NotTheLibrarys:
    """Stands for a function that no attribute is ever found to be."""


def _librarys_own(owner: ModuleType | type, name: str, function: object) -> object:
    """``function``, ``owner``'s attribute ``name``, if its code and that of everything it wraps lies in the package
    that defines it, or is built in."""
    if isinstance(owner, type):  # which may have inherited it
        owner = next((each for each in owner.__mro__ if name in vars(each)), owner)
    module = owner.__module__ if isinstance(owner, type) else owner.__name__
    package = Path(sys.modules[module.partition(".")[0]].__file__).parent
    inner = function
    while inner is not None:
        code = inner if not hasattr(inner, "__func__") else inner.__func__
        if isinstance(code, FunctionType) and package not in Path(inspect.getfile(code)).parents:
            return _NotTheLibrarys()
        inner = getattr(code, "__wrapped__", None)
    return function


def forwards(*types: type[nn.Module]) -> Originals:
    """The forwards of these classes."""
    return Originals(*((each, "forward") for each in types))


# What every path stands for: how modules are called, and the functions that the layers of Transformers are made of.
COMMON = Originals(
    (nn.Module, "__call__"),
    (nn.Module, "_call_impl"),
    (F, "linear"),
    (F, "layer_norm"),
    (F, "dropout"),
    (F, "relu"),
    (F, "gelu"),
    (F, "softmax"),
    (F, "scaled_dot_product_attention"),
) + forwards(nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm, nn.Dropout, nn.ReLU, nn.GELU)


def has_function_mode() -> bool:
    """Whether a ``TorchFunctionMode`` is active that may do anything to torch's functions: all but a default device's,
    which only makes fresh tensors elsewhere."""
    count = torch._C._len_torch_function_stack()
    return count > 0 and any(
        type(torch._C._get_function_stack_at(index)) is not DeviceContext for index in range(count)
    )
