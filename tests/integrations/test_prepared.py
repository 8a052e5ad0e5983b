# SPDX-License-Identifier: BSD-3-Clause
"""What is kept of layers between calls, and that every change of them is noticed."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
import transformers
from torch import nn

from resnorm_ext.build.extension import extension
from resnorm_ext.integrations import accelerate, refresh, restore
from resnorm_ext.integrations.replace import PREPARED

from .conftest import inputs, tiny_config


def kept(model) -> object:
    return model.encoder.__dict__[PREPARED]


def linear(model) -> nn.Linear:
    return model.encoder.layer[1].output.dense


@torch.no_grad()
def test_layers_are_prepared_once(pair):
    _, accelerated = pair
    batch = inputs()
    accelerated(**batch)
    layers = kept(accelerated).layers
    assert len(layers) == 2
    assert not any(part is accelerated.encoder for part in kept(accelerated)._modules)
    for mask in ("none", "holes"):
        accelerated(**inputs(mask))
        assert kept(accelerated).layers is layers


def add_hook(model):
    linear(model).register_forward_hook(lambda *_: None)


def add_hook_to_new_dict(model):
    linear(model)._forward_hooks = OrderedDict({0: lambda *_: None})


def replace_parameter(model):
    linear(model).weight = nn.Parameter(linear(model).weight.clone())


def write_in_place(model):
    linear(model).weight.mul_(2)


def swap_data(model):
    linear(model).weight.data = linear(model).weight.clone()


def load_state(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def replace_module(model):
    model.encoder.layer[1].output.dense = nn.Linear(64, 32)


def subclass_module(model):
    linear(model).__class__ = type("Adapter", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x) * 3})


def override_forward(model):
    linear(model).forward = lambda x: nn.functional.linear(x, linear(model).weight) * 3


def norm_over_more(model):
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm((9, 32))


def sparse_weight(model):
    linear(model).weight = nn.Parameter(linear(model).weight.detach().to_sparse_csr(), requires_grad=False)


def change_eps(model):
    model.encoder.layer[0].output.LayerNorm.eps = 0.1


def change_scale(model):
    model.encoder.layer[0].attention.self.scaling = 0.01


def change_activation(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def drop_a_layer(model):
    del model.encoder.layer[0]


def add_a_layer(model):
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))


def train_a_part(model):
    model.encoder.layer[0].attention.output.dropout.p = 0.9
    model.encoder.layer[0].attention.output.dropout.train()


def change_the_backend(model):
    if PREPARED in model.encoder.__dict__:  # for the whole process, so once
        current = extension.linear_backend(torch.float32, 64, 32)
        extension.set_linear_backend(torch.float32, 64, 32, "resnorm" if current == "aten" else "aten")


def refresh_a_part(model):
    refresh(model.encoder.layer[0])


CHANGES = [
    change_the_backend,
    refresh_a_part,
    add_hook,
    add_hook_to_new_dict,
    replace_parameter,
    write_in_place,
    swap_data,
    load_state,
    replace_module,
    subclass_module,
    override_forward,
    norm_over_more,
    sparse_weight,
    change_eps,
    change_scale,
    change_activation,
    drop_a_layer,
    add_a_layer,
    train_a_part,
]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_every_change_is_noticed(pair, change):
    model, accelerated = pair
    batch = inputs("none")
    accelerated(**batch)
    layers = kept(accelerated).layers
    for each in (model, accelerated):
        torch.manual_seed(3)
        change(each)
    outputs = []
    for each in (model, accelerated):
        torch.manual_seed(4)
        outputs.append(each(**batch).last_hidden_state)
    now = accelerated.encoder.__dict__.get(PREPARED)
    assert now is None or now.layers is not layers
    if change is not train_a_part:  # whose random numbers are others
        torch.testing.assert_close(*outputs, rtol=2e-5, atol=2e-5)
    else:
        assert (outputs[1] - model.eval()(**batch).last_hidden_state).abs().max() > 0.1


@torch.no_grad()
def test_copies_and_pickles_start_anew(pair):
    _, accelerated = pair
    batch = inputs()
    expected = accelerated(**batch).last_hidden_state
    for twin in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
        assert kept(twin) is None
        assert torch.equal(twin(**batch).last_hidden_state, expected)


@torch.no_grad()
def test_it_goes_with_refresh_restore_and_the_model():
    accelerated = accelerate(transformers.BertModel(tiny_config()).eval())
    for undo in (refresh, restore):
        accelerated(**inputs())
        if undo is refresh:
            assert PREPARED in accelerated.encoder.__dict__
        undo(accelerated)
        assert PREPARED not in accelerated.encoder.__dict__
    accelerate(accelerated)(**inputs())
    encoder = weakref.ref(accelerated.encoder)
    weight = weakref.ref(kept(accelerated).layers[0].qkv.weight)
    del accelerated
    assert encoder() is None and weight() is None


@torch.no_grad()
def test_parameters_made_in_inference_mode_are_not_kept(pair):
    model, accelerated = pair
    batch = inputs("none")
    with torch.inference_mode():
        for each in (model, accelerated):
            torch.manual_seed(5)
            each.encoder.layer[0].output.dense = nn.Linear(64, 32)
        for _ in range(2):
            outputs = [each(**batch).last_hidden_state for each in (model, accelerated)]
            torch.testing.assert_close(*outputs, rtol=2e-5, atol=2e-5)
            for each in (model, accelerated):
                each.encoder.layer[0].output.dense.weight.mul_(1.5)
        assert PREPARED not in accelerated.encoder.__dict__


class Kept:
    pass


class TestModuleState:
    def test_is_of_objects_not_values(self):
        module = nn.Linear(2, 2)
        module.number = 1000
        state = extension.module_state((module,), Kept)
        assert extension.has_module_state((module,), state, Kept)
        module.number = int("1000")
        assert not extension.has_module_state((module,), state, Kept)

    def test_all_but_what_is_kept_counts(self):
        module = nn.Linear(2, 2)
        state = extension.module_state((module,), Kept)
        module.kept = type("Of", (Kept,), {})()
        assert extension.has_module_state((module,), state, Kept)
        module.other = object()
        assert not extension.has_module_state((module,), state, Kept)

    def test_order_and_number_count(self):
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        state = extension.module_state((first, second), Kept)
        assert not extension.has_module_state((second, first), state, Kept)
        assert not extension.has_module_state((first,), state, Kept)
        assert not extension.has_module_state((first, second, nn.Linear(2, 2)), state, Kept)
        assert extension.has_module_state((first, second), state, Kept)

    def test_what_has_no_attributes_is_refused(self):
        with pytest.raises(AttributeError):
            extension.module_state((object(),), Kept)
