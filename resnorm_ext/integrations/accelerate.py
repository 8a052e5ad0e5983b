# SPDX-License-Identifier: BSD-3-Clause
"""``accelerate(model)``, ``restore(model)`` and ``report(model)``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from torch import nn

from .._extension import ensure_loaded, extension
from ..engine.linear import LinearShape, choose_backends, forget_linears
from . import torch_nn
from .replace import (
    Finding,
    Integration,
    Unusable,
    add_pre_hook,
    forget_prepared,
    is_replaced,
    original_class,
    put_back,
    remove_pre_hook,
    replace,
)

Model = TypeVar("Model", bound=nn.Module)

# The integrations of a library's models, which only those models need that hold one of its modules.
_INTEGRATIONS = {
    f"transformers.models.{name}.modeling_{name}": name
    for name in ("bert", "distilbert", "gpt2", "roberta", "vit", "xlm_roberta")
}


def accelerate(model: Model) -> Model:
    """Makes ``model`` faster in place, and returns it.

    What it recognises in this instance (``nn.LayerNorm``, ``nn.TransformerEncoder`` and its layers, Hugging Face's
    BERT, DistilBERT, RoBERTa, XLM-RoBERTa, ViT and GPT-2) goes on with this package's operators: in inference with the
    fastest of three products for the linear layers, and text encoders on padding-free batches; in training with fused
    dropout, residual add and norm. Parameters, state_dict keys, hooks, copies and pickles are as before. A second call
    changes nothing; :func:`restore` puts everything back; :func:`report` tells what was done. Which way a call takes is
    decided at that call, so adapters, hooks, dtypes and modes may change later.

    Outputs equal the original's at unmasked positions within rounding. Padded positions are zeros where a call has run
    without padding. On the CPU a second, packed copy of the linear layers' weights may be kept for inference; it is
    made anew when they have changed, but see :func:`refresh` for writes through ``.data``.

    Measures the linear layers' shapes for some hundredths of a second, unless the environment variable
    ``RESNORM_LINEAR`` (``aten``, ``onednn`` or ``resnorm``) chooses, or under deterministic algorithms.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ImportError: there is no built extension, and none can be compiled.
    """
    _check_module(model)
    ensure_loaded()
    for finding in _findings(model):
        if finding.replacement is not None and not is_replaced(finding.module):
            replace(finding.module, finding.replacement)
    for integration in _integrations():
        for module, hook in integration.hooks(model):
            add_pre_hook(module, hook)
    choose_backends(_linear_shapes(model))
    return model


def restore(model: Model) -> Model:
    """Undoes :func:`accelerate`, also in a copy of an accelerated model, and returns ``model``."""
    _check_module(model)
    for integration in _integrations():
        for module, hook in integration.hooks(model):
            remove_pre_hook(module, hook)
    for module in model.modules():
        put_back(module)
    return refresh(model)


def refresh(model: Model) -> Model:
    """Forgets the copies of ``model``'s weights that inference has made, and returns ``model``.

    To be called after writing a part of a weight through ``.data``, as in ``weight.data[0] = 1.0``: torch does not
    count such a change, and only a few dozen of a weight's values are compared at each call. Others are seen.
    """
    _check_module(model)
    for module in model.modules():
        forget_prepared(module)
    forget_linears(model.parameters())
    return model


class Replaced(NamedTuple):
    """A module that :func:`accelerate` has replaced; ``obstacle`` is what keeps it from its fastest path at present."""

    name: str
    original: type[nn.Module]
    replacement: type[nn.Module]
    obstacle: str | None


class LeftAlone(NamedTuple):
    """A module of a kind that :func:`accelerate` knows and has not replaced."""

    name: str
    type: type[nn.Module]
    reason: str


class Report(NamedTuple):
    """What is replaced in a model and what is not; ``str()`` of it is for people.

    Attributes:
        linear_backends: what multiplies in inference for each shape of linear layer.
    """

    replaced: list[Replaced]
    left_alone: list[LeftAlone]
    linear_backends: dict[LinearShape, str]

    def __str__(self) -> str:
        lines = [f"replaced: {len(self.replaced)} modules"]
        lines += _grouped((item.original.__name__, item.obstacle, item.name) for item in self.replaced)
        lines.append(f"left alone: {len(self.left_alone)} modules")
        lines += _grouped((item.type.__name__, item.reason, item.name) for item in self.left_alone)
        if self.linear_backends:
            lines.append("linear layers:")
        for shape, backend in self.linear_backends.items():
            dtype = str(shape.dtype).removeprefix("torch.")
            lines.append(f"  {shape.in_features} -> {shape.out_features} {dtype}: {backend}")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What is replaced in ``model`` as it is now, what is not, and why."""
    _check_module(model)
    replaced, left_alone = [], []
    for name, module, replacement, reason in _findings(model):
        if is_replaced(module):
            replaced.append(Replaced(name, original_class(module), type(module), reason))
        elif replacement is not None:
            left_alone.append(LeftAlone(name, type(module), "accelerate() has not been called"))
        else:
            left_alone.append(LeftAlone(name, type(module), reason))
    backends = {shape: extension.linear_backend(*shape) for shape in dict.fromkeys(_linear_shapes(model)) if replaced}
    return Report(replaced, left_alone, backends)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}")


def _integrations() -> Iterator[Integration]:
    yield torch_nn
    for library, name in _INTEGRATIONS.items():
        if library in sys.modules:
            try:
                yield importlib.import_module(f".{name}", __package__).INTEGRATION
            except ImportError as error:
                yield Unusable(library, error)


def _findings(model: nn.Module) -> list[Finding]:
    return [finding for integration in _integrations() for finding in integration.find(model)]


def _linear_shapes(model: nn.Module) -> list[LinearShape]:
    return [shape for integration in _integrations() for shape in integration.linear_shapes(model)]


def _grouped(items: Iterator[tuple[str, str | None, str]]) -> list[str]:
    """A line for each kind of module and reason, with how many and the first one's name."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for kind, reason, name in items:
        groups.setdefault((kind, reason), []).append(name or "the model")
    return [
        f"  {kind} x {len(names)} ({names[0]}{', ...' if len(names) > 1 else ''})" + (f": {reason}" if reason else "")
        for (kind, reason), names in groups.items()
    ]
