# SPDX-License-Identifier: BSD-3-Clause
"""A text encoder's call in one call into the engine: when it is taken, and that it gives what the original does."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from torch import nn

from resnorm_ext.integrations import accelerate, restore

from .conftest import assert_same_at_real_positions, assert_same_output, assert_same_outputs, inputs, tiny_config
from .families import FAMILIES

TEXT = ("BERT", "RoBERTa", "XLM-RoBERTa", "CamemBERT", "ELECTRA", "ERNIE", "DistilBERT")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("mask", ["full", "right", "holes"])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", TEXT)
def test_every_family(is_whole, name, ids, mask):
    model = FAMILIES[name].build()
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs(mask)
    batch["input_ids"][0, 4] = 0  # the id of padding, in a text
    if name == "DistilBERT":
        del batch["token_type_ids"]
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
    assert_same_outputs(pair, batch)


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
    assert_same_outputs(pair, batch)
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
    assert_same_outputs(pair, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_whole(pair[1], **batch)
        actual, expected = pair[1](**batch), pair[0](**batch)
    assert actual.pooler_output.dtype == expected.pooler_output.dtype
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("arguments", [{"bias": False}, {"elementwise_affine": False}])
def test_a_norm_without_parameters(pair, is_whole, arguments):
    for model in pair:
        model.embeddings.LayerNorm = nn.LayerNorm(32, **arguments)
    assert is_whole(pair[1], **inputs())
    assert_same_outputs(pair, inputs())


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


def test_outputs_may_be_written_where_grad_is_recorded(pair, is_whole):
    batch = inputs()
    assert is_whole(pair[1], **batch)
    output = pair[1](**batch)
    factor = torch.ones(32, requires_grad=True)
    with torch.enable_grad():
        for tensor in (output.pooler_output, output.last_hidden_state):
            tensor.mul_(factor).sum().backward()
            tensor.detach_()
