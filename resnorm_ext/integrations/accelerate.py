# SPDX-License-Identifier: BSD-3-Clause
"""``accelerate(model)``, ``restore(model)`` and ``refresh(model)``."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import nn

from ..build.extension import ensure_loaded
from ..compatibility import transformers_reason
from ..engine.linear import LinearShape, choose_backends
from ..engine.weights import forget_all_weights
from ..modules.calls import Model
from ..modules.padding import PaddingChoice, check_choice
from . import models
from .models import torch_nn
from .quantization import register_for_quantization
from .replace import (
    Finding,
    Integration,
    Unusable,
    add_hooks,
    add_pre_hook,
    class_put_back,
    forget_prepared,
    is_replaced,
    put_back,
    remove_hooks,
    remove_pre_hook,
    replace,
)

T = TypeVar("T")

# The families of transformers' models that there is a file for, by how the names of the modules end that define them.
FAMILIES = sorted(module.name for module in pkgutil.iter_modules(models.__path__) if module.name != "torch_nn")


def accelerate(model: T, *, padding: str = "auto") -> T:
    """Makes ``model`` faster in place, and returns it.

    What it recognises in this instance (``nn.LayerNorm`` and ``nn.RMSNorm``, ``nn.TransformerEncoder`` and its layers,
    Hugging Face's BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ERNIE, DistilBERT, BART's encoder, ViT and GPT-2)
    goes on with this package's operators: in inference with the fastest of three products for the linear layers, and
    text encoders on padding-free batches, compiled and exported too; in training with dropout that keeps no mask, fused
    with residual add and norm, and attention that keeps no weights. Parameters, state_dict keys, hooks, copies and
    pickles are as before. A second call changes nothing but ``padding``; ``restore`` puts everything back;
    ``report`` tells what was done, and which way the calls took since. That is decided at each call, so adapters,
    hooks, dtypes and modes may change later.

    Outputs equal the original's at every position that is not padded, within rounding. On the CPU a second, packed copy
    of the linear layers' weights may be kept for inference, made anew when they have changed; docs/accelerate.md says
    what is looked at, and ``refresh`` is for the little that cannot be seen.

    Measures the linear layers' shapes for some hundredths of a second, unless the environment variable
    ``RESNORM_LINEAR`` (``aten``, ``onednn`` or ``resnorm``) chooses, or under deterministic algorithms.

    Args:
        model: an ``nn.Module``, or what holds one, such as a pipeline.
        padding: ``"auto"`` skips padded positions, and leaves zeros there, without grad and only where that is
            expected: in Hugging Face's text encoders, but not where a loss reads padded positions; and in
            ``nn.TransformerEncoder`` where torch's nested tensors would do the same. ``"skip"`` skips them wherever
            that can be done, for who does not read them, in training too. ``"compute"``
            computes them as the original does.

    Raises:
        TypeError: ``model`` neither is an ``nn.Module`` nor holds just one.
        ValueError: ``padding`` is none of these.
        ImportError: there is no built extension, and none can be compiled.
    """
    module = module_of(model)
    check_choice(padding)
    ensure_loaded()
    register_for_quantization()
    shared = Model()
    for finding in findings(module):
        if finding.replacement is not None and not is_replaced(finding.module):
            replace(finding.module, finding.replacement, shared)
        if is_replaced(finding.module) and isinstance(finding.module, PaddingChoice):
            finding.module.padding = padding
    for integration in integrations():
        for hooked, hook in integration.hooks(module):
            add_pre_hook(hooked, hook)
    for head, before, after in _heads(module):
        add_hooks(head, before, after)
    choose_backends(linear_shapes(module))
    return model


def restore(model: T) -> T:
    """Undoes ``accelerate``, also in a copy of an accelerated model, and returns ``model``.

    Raises RuntimeError, and changes nothing, where a module's class is built by others on this package's so that it
    cannot be told what it would be without.
    """
    module = module_of(model)
    classes = [(each, class_put_back(each, name)) for name, each in module.named_modules() if is_replaced(each)]
    heads = list(_heads(module))
    for integration in integrations():
        for hooked, hook in integration.hooks(module):
            remove_pre_hook(hooked, hook)
    for head, before, after in heads:
        remove_hooks(head, before, after)
    for each, class_ in classes:
        put_back(each, class_)
    return refresh(model)


def refresh(model: T) -> T:
    """Forgets the copies of ``model``'s weights that inference has made, and returns ``model``.

    To be called after a write that torch has no part in: through numpy, DLPack, a storage or a pointer. What torch
    writes is seen, through ``.data`` too, unless that alias was made before the weight was first read by inference.
    """
    for each in module_of(model).modules():
        forget_prepared(each)
    forget_all_weights()
    return model


def module_of(model: object) -> nn.Module:
    """``model``, or the one module that it holds.

    Raises TypeError where it is neither, which names the attributes that hold some.
    """
    if isinstance(model, nn.Module):
        return model
    held = {name: value for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, nn.Module)}
    if len(set(map(id, held.values()))) == 1:
        return next(iter(held.values()))
    found = f", which holds modules as {' and '.join(f'.{name}' for name in held)}: pass one of them" if held else ""
    raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}{found}")


def integrations() -> Iterator[Integration]:
    yield torch_nn
    libraries = _libraries_in_use()
    if not libraries:
        return
    version = sys.modules["transformers"].__version__
    if reason := transformers_reason(version):
        yield Unusable(list(libraries), reason)
        return
    for library, family in libraries.items():
        try:
            yield importlib.import_module(f".models.{family}", __package__).INTEGRATION
        except ImportError as error:
            yield Unusable([library], f"transformers {version} is not supported ({error})")


def _libraries_in_use() -> dict[str, str]:
    """The modules of transformers that there is a family for and that something has imported, as whoever holds a model
    of theirs has, and the families."""
    libraries = {library: library.rpartition(".modeling_")[2] for library in sorted(sys.modules)}
    return {
        library: family
        for library, family in libraries.items()
        if library.startswith("transformers.models.") and family in FAMILIES
    }


def findings(model: nn.Module) -> list[Finding]:
    return [finding for integration in integrations() for finding in integration.find(model)]


def linear_shapes(model: nn.Module) -> list[LinearShape]:
    return [shape for integration in integrations() for shape in integration.linear_shapes(model)]


def _heads(model: nn.Module) -> Iterator[tuple[nn.Module, Callable, Callable]]:
    """The modules on text encoders whose calls may ask for padding, and the hooks by which they do."""
    if f"{__package__}.varlen" not in sys.modules:  # then there is no packed encoder either
        return
    from .heads import after_head, before_head, heads  # late: it needs transformers

    for head in heads(model):
        yield head, before_head, after_head
