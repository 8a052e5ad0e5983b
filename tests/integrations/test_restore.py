# SPDX-License-Identifier: BSD-3-Clause
"""``restore`` under whatever has been wrapped around forwards since: nothing of this package is left."""

from __future__ import annotations

import copy
import functools
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from resnorm_ext.integrations import accelerate, report, restore

from .families import FAMILIES, assert_same, output_of

hf_accelerate = pytest.importorskip("accelerate")


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def is_ours(value: object) -> bool:
    module = getattr(getattr(value, "__func__", value), "__module__", None)
    return isinstance(module, str) and module.startswith("resnorm_ext")


def assert_nothing_is_left(model: nn.Module) -> None:
    assert not report(model).replaced
    for module in model.modules():
        assert not type(module).__module__.startswith("resnorm_ext")
        assert not any("resnorm" in name for name in vars(module))
        assert not any(isinstance(value, MethodType) and is_ours(value) for value in vars(module).values())
        assert not any(map(is_ours, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))


def check(family, model, accelerated) -> None:
    batch = family.batch(model)
    with torch.no_grad():
        expected = output_of(model, batch)
        assert_same(output_of(accelerated, batch), expected)
        restore(accelerated)
        assert_nothing_is_left(accelerated)
        assert_same(output_of(accelerated, batch), expected, 1e-6)


def test_offloading_hooks_that_came_and_went(family):
    model = family.build()
    accelerated = accelerate(copy.deepcopy(model))
    hf_accelerate.cpu_offload(accelerated, execution_device=torch.device("cpu"))
    hf_accelerate.hooks.remove_hook_from_module(accelerated, recurse=True)
    check(family, model, accelerated)


def test_wrapped_by_a_closure(family):
    """The wrapper keeps this package's forward, which then runs the original's."""
    model = family.build()
    accelerated = accelerate(copy.deepcopy(model))
    for module in accelerated.modules():
        if type(module).__module__.startswith("resnorm_ext"):
            inner = module.forward
            module.forward = lambda *args, _inner=inner, **kwargs: _inner(*args, **kwargs)
    check(family, model, accelerated)


def test_wrapped_by_a_partial(family):
    model = family.build()
    accelerated = accelerate(copy.deepcopy(model))
    for module in accelerated.modules():
        if type(module).__module__.startswith("resnorm_ext"):
            module.forward = functools.partial(type(module).forward, module)
    check(family, model, accelerated)


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "nn.TransformerEncoder"])
def test_compiled(name):
    family = FAMILIES[name]
    model = family.build()
    accelerated = accelerate(copy.deepcopy(model))
    layer = accelerated if name.startswith("nn") else accelerated.get_submodule(family.layers.rpartition(".")[0])
    layer.forward = torch.compile(layer.forward, backend="eager")
    check(family, model, accelerated)


@pytest.mark.parametrize("make", ["parametrize", "mixin"])
def test_a_class_made_of_the_replacement(family, make):
    model = family.build()
    accelerated = accelerate(copy.deepcopy(model))
    pairs = [next(m for m in each.modules() if isinstance(m, nn.LayerNorm)) for each in (model, accelerated)]
    for norm in pairs:
        if make == "parametrize":
            parametrize.register_parametrization(norm, "weight", nn.Identity())
        else:  # as fully_shard does
            norm.__class__ = type("Sharded", (Mixin, type(norm)), {})
    batch = family.batch(model)
    with torch.no_grad():
        expected = output_of(model, batch)
        assert_same(output_of(accelerated, batch), expected)
        restore(accelerated)
        assert_same(output_of(accelerated, batch), expected, 1e-6)
    assert not any("resnorm" in each.__module__ for module in accelerated.modules() for each in type(module).__mro__)
    assert type(pairs[1]).__name__ == type(pairs[0]).__name__


class Mixin:
    pass


def test_what_cannot_be_undone_is_refused_before_anything_is_changed(family):
    accelerated = accelerate(family.build())
    norm = [m for m in accelerated.modules() if isinstance(m, nn.LayerNorm)][-1]
    middle = type("Middle", (type(norm),), {})
    norm.__class__ = type("Outer", (middle,), {})
    before = [type(module) for module in accelerated.modules()]
    with pytest.raises(RuntimeError, match=r"cannot restore .*: its class Outer inherits from LayerNorm through"):
        restore(accelerated)
    assert [type(module) for module in accelerated.modules()] == before
    assert report(accelerated).replaced
    norm.__class__ = middle.__bases__[0]
    assert_nothing_is_left(restore(accelerated))
