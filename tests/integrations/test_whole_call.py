# SPDX-License-Identifier: BSD-3-Clause
"""A text encoder's call in one call into the engine: when it is taken, that it gives what the original does, and that
nothing that is changed between two calls is missed."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert

from resnorm_ext.integrations import accelerate, restore, whole_call

from .conftest import assert_same_at_real_positions, inputs, tiny_config
from .families import FAMILIES

TEXT = ("BERT", "RoBERTa", "XLM-RoBERTa", "CamemBERT", "ELECTRA", "ERNIE", "DistilBERT")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def is_whole(monkeypatch) -> Callable[..., bool]:
    """``is_whole(model, ...)``: calls it, and tells whether the engine's answer was the model's."""
    answers = []

    def encode_text(*args):
        answers.append(whole_call_extension.encode_text(*args))
        return answers[-1]

    whole_call_extension = whole_call.extension
    names = ("TextWeights", "module_state", "has_module_state")
    monkeypatch.setattr(
        whole_call,
        "extension",
        SimpleNamespace(encode_text=encode_text, **{name: getattr(whole_call_extension, name) for name in names}),
    )

    def call(model: nn.Module, *args, **kwargs) -> bool:
        answers.clear()
        output = model(*args, **kwargs)
        hidden = output[0]
        return bool(answers) and answers[0] is not None and hidden.data_ptr() == answers[0][0].data_ptr()

    return call


def assert_same_output(actual, expected, batch) -> None:
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    assert_same_at_real_positions(actual.last_hidden_state, expected.last_hidden_state, batch, 2e-4)
    if "pooler_output" in expected:
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=2e-4, atol=2e-4)


def same(pair, batch, **arguments) -> None:
    """That both models give the same now."""
    model, accelerated = pair
    assert_same_output(accelerated(**batch, **arguments), model(**batch, **arguments), batch)


@pytest.mark.parametrize("mask", ["full", "right", "holes"])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", TEXT)
def test_every_family(is_whole, name, ids, mask):
    model = FAMILIES[name].build()
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs(mask)
    batch["input_ids"][0, 4] = 0  # the id of padding, in a text
    if name in ("DistilBERT",):
        del batch["token_type_ids"]
    elif name in ("RoBERTa", "XLM-RoBERTa", "CamemBERT"):
        batch["token_type_ids"].clamp_max_(1)
    batch = {key: value.to(ids) for key, value in batch.items()}
    for dropped in ({}, {"token_type_ids"}):
        given = {key: value for key, value in batch.items() if key not in dropped}
        assert is_whole(accelerated, **given)
        output = accelerated(**given)
        assert_same_output(output, model(**given), batch)
        assert not output.last_hidden_state[batch["attention_mask"] == 0].any()
        others = {key: value for key, value in given.items() if key not in ("input_ids", "attention_mask")}
        positional = accelerated(given["input_ids"], given["attention_mask"], **others)
        assert_same_output(positional, model(**given), batch)


@pytest.mark.parametrize("pooling", [True, False])
def test_without_a_mask_or_a_pooler(is_whole, pooling):
    model = transformers.BertModel(tiny_config(), add_pooling_layer=pooling).eval()
    accelerated = accelerate(copy.deepcopy(model))
    ids = torch.randint(1, 100, (3, 7))
    assert is_whole(accelerated, ids)
    actual, expected = accelerated(ids), model(ids)
    assert actual.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=2e-5, atol=2e-5)


def test_a_head_on_it(is_whole):
    model = transformers.BertForSequenceClassification(tiny_config()).eval()
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs()
    assert is_whole(accelerated.bert, **batch)
    torch.testing.assert_close(accelerated(**batch).logits, model(**batch).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"position_ids": torch.arange(9).flip(0).unsqueeze(0)},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
    ],
)
def test_other_arguments(pair, is_whole, arguments):
    model, accelerated = pair
    batch = inputs()
    assert not is_whole(accelerated, **batch, **arguments)
    actual, expected = accelerated(**batch, **arguments), model(**batch, **arguments)
    assert type(actual) is type(expected) and len(actual) == len(expected)
    assert_same_at_real_positions(actual[0], expected[0], batch)
    if "output_hidden_states" in arguments:
        for each, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
            assert_same_at_real_positions(each, other, batch)


def test_embeddings_given(pair, is_whole):
    batch = inputs()
    batch["inputs_embeds"] = pair[0].embeddings.word_embeddings(batch.pop("input_ids"))
    assert not is_whole(pair[1], **batch)
    same(pair, batch)


@pytest.mark.parametrize("padding", ["auto", "skip"])
def test_padding_on_the_left(tiny, is_whole, padding):
    accelerated = accelerate(copy.deepcopy(tiny), padding=padding)
    batch = inputs("left")
    assert not is_whole(accelerated, **batch)
    assert_same_at_real_positions(accelerated(**batch)[0], tiny(**batch)[0], batch)


def test_padding_that_is_to_be_computed(tiny, is_whole):
    accelerated = accelerate(copy.deepcopy(tiny), padding="compute")
    batch = inputs()
    assert not is_whole(accelerated, **batch)
    torch.testing.assert_close(accelerated(**batch)[0], tiny(**batch)[0], rtol=2e-5, atol=2e-5)
    assert is_whole(accelerated, **inputs("full"))


def test_a_loss_that_reads_padding():
    model = transformers.BertForTokenClassification(tiny_config(num_labels=5)).eval()
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs() | {"labels": torch.randint(0, 5, (4, 9))}
    for _ in range(2):
        torch.testing.assert_close(accelerated(**batch).loss, model(**batch).loss, rtol=2e-5, atol=2e-5)


def test_grad_mode(pair, is_whole):
    batch = inputs()
    same(pair, batch)
    with torch.enable_grad():
        assert not is_whole(pair[1], **batch)
        output = pair[1](**batch).last_hidden_state
        output.sum().backward()
        assert pair[1].embeddings.word_embeddings.weight.grad is not None
        pair[1].requires_grad_(False)
        assert is_whole(pair[1], **batch)
        pair[1].embeddings.LayerNorm.weight.requires_grad_()
        assert not is_whole(pair[1], **batch)


def test_autocast(pair, is_whole):
    batch = inputs()
    same(pair, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_whole(pair[1], **batch)
        actual, expected = pair[1](**batch), pair[0](**batch)
    assert actual.pooler_output.dtype == expected.pooler_output.dtype


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
    same(pair, batch)
    monkeypatch.undo()


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
    same(pair, batch)


def test_a_pooler_of_another_kind(pair, is_whole):
    batch = inputs()
    for model in pair:
        model.pooler = nn.Identity()
    for _ in range(2):
        assert not is_whole(pair[1], **batch)
        assert_same_at_real_positions(pair[1](**batch)[1], pair[0](**batch)[1], batch)


@pytest.mark.parametrize("arguments", [{"bias": False}, {"elementwise_affine": False}])
def test_a_norm_without_parameters(pair, is_whole, arguments):
    for model in pair:
        model.embeddings.LayerNorm = nn.LayerNorm(32, **arguments)
    assert is_whole(pair[1], **inputs())
    same(pair, inputs())


def test_a_pooler_of_another_dtype(pair, is_whole):
    for model in pair:
        model.pooler.double()
        with pytest.raises(RuntimeError):
            model(**inputs())


def test_ids_and_lengths_that_there_are_not(pair):
    for model in pair:
        with pytest.raises(IndexError, match="index out of range"):
            model(torch.full((1, 3), 100))
        with pytest.raises(IndexError, match="index out of range"):
            model(torch.ones(1, 3, dtype=torch.long), token_type_ids=torch.full((1, 3), 2))
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 41, dtype=torch.long))
        with pytest.raises(ValueError, match="input_ids"):
            model()
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 3))
        model(torch.ones(1, 3, dtype=torch.long))


def test_its_class_is_as_the_librarys(tiny):
    original = type(tiny)
    accelerated = accelerate(copy.deepcopy(tiny))
    assert isinstance(accelerated, original) and type(accelerated).__name__ == "BertModel"
    assert inspect.signature(accelerated.forward) == inspect.signature(tiny.forward)
    assert not accelerated._forward_pre_hooks
    batch = inputs()
    accelerated(**batch)
    copies = [copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))]
    for each in copies:
        assert_same_output(each(**batch), tiny(**batch), batch)
    assert type(restore(accelerated)) is original


def test_a_subclass_packs_by_a_hook(tiny, path_of):
    class Model(transformers.BertModel):
        pass

    model = Model(tiny.config).eval()
    model.load_state_dict(tiny.state_dict())
    accelerate(model)
    batch = inputs()
    assert type(model) is Model and len(model._forward_pre_hooks) == 1
    assert path_of(model, **batch) == "packed"
    assert_same_at_real_positions(model(**batch)[0], tiny(**batch)[0], batch)
    restore(model)
    assert not model._forward_pre_hooks


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
    same(pair, batch)


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
    same(pair, inputs())


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
        same(pair, batch)
        for model in pair:
            write(model.get_submodule(name).weight)


def test_a_gradient_for_what_is_no_parameter(pair):
    batch = inputs()
    same(pair, batch)
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
    same(pair, inputs())


def test_outputs_may_be_written_where_grad_is_recorded(pair, is_whole):
    batch = inputs()
    assert is_whole(pair[1], **batch)
    output = pair[1](**batch)
    factor = torch.ones(32, requires_grad=True)
    with torch.enable_grad():
        for tensor in (output.pooler_output, output.last_hidden_state):
            tensor.mul_(factor).sum().backward()
            tensor.detach_()


def test_the_attention_of_the_layers(pair, monkeypatch):
    """Which is not the one that the model's configuration names."""
    batch = inputs("full")
    for model in pair:
        model.config = copy.deepcopy(model.config)
        model.config._attn_implementation = "eager"
    same(pair, batch)
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def tripled(*args, **kwargs):
        output, weights = attention(*args, **kwargs)
        return output * 3, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", tripled)
    same(pair, batch)


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
    same(pair, inputs())
