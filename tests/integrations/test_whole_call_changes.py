# SPDX-License-Identifier: BSD-3-Clause
"""A text encoder's call in one call into the engine keeps what it has found out about a model: nothing that is changed
between two calls is missed, and nothing that it does not read matters."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert

from resnorm_ext.integrations import accelerate

from .conftest import assert_same_at_real_positions, assert_same_output, assert_same_outputs, inputs


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


CHANGES = {
    "a word": lambda model: model.embeddings.word_embeddings.weight.data.mul_(-1),
    "a position": lambda model: model.embeddings.position_embeddings.weight.add_(1),
    "positions": lambda model: model.embeddings.position_ids.copy_(model.embeddings.position_ids.flip(1)),
    "a norm": lambda model: setattr(model.embeddings.LayerNorm, "bias", nn.Parameter(torch.ones(32))),
    "an eps": lambda model: setattr(model.embeddings.LayerNorm, "eps", 1.0),
    "a layer": lambda model: model.encoder.layer[0].output.dense.weight.neg_(),
    "the layers": lambda model: setattr(model.encoder, "layer", model.encoder.layer[:1]),
    "the pooler's weight": lambda model: model.pooler.dense.weight.data.mul_(2),
    "the pooler's activation": lambda model: setattr(model.pooler, "activation", nn.ReLU()),
    "the pooler": lambda model: setattr(model, "pooler", None),
    "a state": lambda model: model.load_state_dict({key: -value for key, value in model.state_dict().items()}),
    "a hook of the pooler": lambda model: model.pooler.register_forward_hook(lambda *_: torch.ones(4, 32)),
    "a hook of the embeddings": lambda model: model.embeddings.register_forward_hook(lambda *args: args[-1] * 2),
    "a hook of a layer": lambda model: model.encoder.layer[1].register_forward_hook(lambda *args: args[-1] * 2),
    "a hook of the model": lambda model: model.register_forward_pre_hook(lambda _, args: (args[0].flip(1),)),
    "a dtype": lambda model: model.to(torch.float64),
    "eager attention": lambda model: model.set_attn_implementation("eager"),
    "a forward": lambda model: setattr(model.pooler, "forward", lambda x: -x[:, 0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls(pair, change):
    batch = inputs()
    arguments = [batch.pop("input_ids")]
    for model in pair:
        model(*arguments, **batch)
    before = pair[1](*arguments, **batch)
    for model in pair:
        CHANGES[change](model)
    for _ in range(2):
        actual, expected = (model(*arguments, **batch) for model in reversed(pair))
        assert actual.keys() == expected.keys()
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(actual[0][real], expected[0][real], rtol=2e-5, atol=2e-5)
        if "pooler_output" in expected:
            torch.testing.assert_close(actual[1], expected[1], rtol=2e-5, atol=2e-5)
    unchanged = actual.keys() == before.keys() and all(torch.equal(actual[key].float(), before[key]) for key in before)
    assert not unchanged or change == "eager attention"


@pytest.mark.parametrize("flag, value", [("output_hidden_states", True), ("return_dict", False)])
def test_a_config_that_changes(pair, is_whole, flag, value):
    batch = inputs()
    assert is_whole(pair[1], **batch)
    for model in pair:
        setattr(model.config, flag, value)
    assert not is_whole(pair[1], **batch)
    actual, expected = pair[1](**batch), pair[0](**batch)
    assert type(actual) is type(expected) and len(actual) == len(expected)


def test_replaced_functions(pair, is_whole, monkeypatch):
    batch = inputs()
    assert is_whole(pair[1], **batch)
    monkeypatch.setattr(type(pair[0].pooler), "forward", lambda self, hidden: -hidden[:, 0])
    assert not is_whole(pair[1], **batch)
    assert_same_outputs(pair, batch)


@pytest.mark.parametrize(
    "owner, name, function",
    [
        (torch, "tanh", torch.zeros_like),
        (modeling_bert, "create_bidirectional_mask", lambda **_: torch.eye(9, dtype=torch.bool)[None, None]),
    ],
)
def test_other_functions_replaced(pair, is_whole, monkeypatch, owner, name, function):
    batch = inputs("full")
    assert is_whole(pair[1], **batch)
    monkeypatch.setattr(owner, name, function)
    assert not is_whole(pair[1], **batch)
    assert_same_outputs(pair, batch)


def test_a_pooler_of_another_kind(pair, is_whole):
    batch = inputs()
    for model in pair:
        model.pooler = nn.Identity()
    for _ in range(2):
        assert not is_whole(pair[1], **batch)
        assert_same_at_real_positions(pair[1](**batch)[1], pair[0](**batch)[1], batch)


def test_weights_that_count_no_versions(tiny):
    """What inference mode makes is not kept."""
    with torch.inference_mode():
        model = transformers.BertModel(tiny.config).eval()
        model.load_state_dict(tiny.state_dict())
        accelerate(model)
        batch = inputs()
        for _ in range(2):
            assert_same_output(model(**batch), tiny(**batch), batch)
            for each in (model, tiny):
                each.pooler.dense.weight.mul_(-1)


def test_a_config_of_another_kind(pair, is_whole):
    for model in pair:
        model.pooler.config = {"anything": 1}
    batch = inputs()
    assert is_whole(pair[1], **batch)
    assert_same_outputs(pair, batch)


def _with_freed_buffer(model: nn.Module) -> None:
    model.register_buffer("extra", torch.ones(3))
    model.extra.untyped_storage().resize_(0)


class _ConfigRaises(nn.Module):
    @property
    def config(self):
        raise RuntimeError("not yet")


UNREAD = {
    "sparse": lambda model: setattr(model, "extra", nn.Parameter(torch.eye(3).to_sparse())),
    "compressed rows": lambda model: model.register_buffer("extra", torch.eye(3).to_sparse_csr()),
    "uninitialized": lambda model: setattr(model, "extra", nn.LazyLinear(4)),
    "freed": _with_freed_buffer,
    "a config that raises": lambda model: setattr(model, "extra", _ConfigRaises()),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_a_call_does_not_read(pair, is_whole, kind):
    UNREAD[kind](pair[1])
    assert is_whole(pair[1], **inputs())
    assert_same_outputs(pair, inputs())


@pytest.mark.parametrize("name", ["pooler.dense", "embeddings.word_embeddings", "embeddings.LayerNorm"])
def test_weights_of_a_tensor_subclass(pair, is_whole, name):
    batch = inputs()
    for model in pair:
        module = model.get_submodule(name)
        weight = module.weight.detach()
        module.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    assert not is_whole(pair[1], **batch)
    if name == "pooler.dense":  # else outputs are of that kind too
        assert_same_at_real_positions(pair[1](**batch)[0], pair[0](**batch)[0], batch)


@pytest.mark.parametrize("name", ["pooler.dense", "embeddings.word_embeddings", "encoder.layer.1.output.dense"])
@pytest.mark.parametrize("write", [lambda weight: weight.mul_(2), lambda weight: setattr(weight, "data", weight * 2)])
def test_weights_that_are_no_parameters(pair, name, write):
    batch = inputs()
    for model in pair:
        module = model.get_submodule(name)
        weight = module.weight.detach().clone()
        del module.weight
        module.weight = weight
    for _ in range(2):
        assert_same_outputs(pair, batch)
        for model in pair:
            write(model.get_submodule(name).weight)


def test_a_gradient_for_what_is_no_parameter(pair):
    batch = inputs()
    assert_same_outputs(pair, batch)
    for model in pair:
        model.requires_grad_(False)
        weight = model.pooler.dense.weight.detach().clone().requires_grad_()
        del model.pooler.dense.weight
        model.pooler.dense.weight = weight
        with torch.enable_grad():
            model(**batch).pooler_output.sum().backward()
    torch.testing.assert_close(*(model.pooler.dense.weight.grad for model in pair), rtol=1e-4, atol=1e-4)


def test_a_model_without_parameters(pair):
    for module in pair[1].modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            if parameter is not None:
                setattr(module, name, parameter.detach())
    assert_same_outputs(pair, inputs())


def test_the_attention_of_the_layers(pair, monkeypatch):
    """Which is not the one that the model's configuration names."""
    batch = inputs("full")
    for model in pair:
        model.config = copy.deepcopy(model.config)
        model.config._attn_implementation = "eager"
    assert_same_outputs(pair, batch)
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def tripled(*args, **kwargs):
        output, weights = attention(*args, **kwargs)
        return output * 3, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", tripled)
    assert_same_outputs(pair, batch)


def test_configurations_of_another_kind(pair, is_whole):
    class Proxy:
        def __init__(self, config):
            self._config = config

        def __getattr__(self, name):
            return getattr(self.__dict__["_config"], name)

    for model in pair:
        config = Proxy(model.config)
        for module in model.modules():
            if "config" in module.__dict__:
                module.config = config
    assert not is_whole(pair[1], **inputs())
    assert_same_outputs(pair, inputs())
