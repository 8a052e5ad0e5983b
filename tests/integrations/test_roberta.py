# SPDX-License-Identifier: BSD-3-Clause
"""Accelerated RoBERTas against transformers. What they share with BERT, test_bert_*.py tests there."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers

from resnorm_ext.integrations import accelerate, report, restore

from .conftest import MASKS, assert_same_at_real_positions, ids_embedded, tiny_config

PAD = 1


@pytest.fixture(params=["Roberta", "XLMRoberta"])
def family(request) -> str:
    return request.param


def build(family: str, head: str = "Model", **changes) -> torch.nn.Module:
    sizes = tiny_config(pad_token_id=PAD, **changes).to_dict()
    config = getattr(transformers, f"{family}Config")(**{k: v for k, v in sizes.items() if k != "model_type"})
    return getattr(transformers, family + head)(config).eval()


def inputs(mask: str) -> dict[str, torch.Tensor]:
    """Four sequences padded to nine tokens; one of them also holds a padding token that is not masked."""
    ids = torch.randint(2, 100, (4, 9))
    if MASKS[mask] is None:
        return {"input_ids": ids}
    attention_mask = torch.tensor(MASKS[mask])
    ids[attention_mask == 0] = PAD
    ids[0, 3] = PAD
    return {"input_ids": ids, "attention_mask": attention_mask}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_inference(family, mask, implementation, path_of):
    model = build(family)
    model.set_attn_implementation(implementation)
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs(mask)
    outputs = []
    way = path_of(lambda: outputs.append(accelerated(**batch)))
    expected = model(**batch)
    assert_same_at_real_positions(outputs[0].last_hidden_state, expected.last_hidden_state, batch)
    torch.testing.assert_close(outputs[0].pooler_output, expected.pooler_output, rtol=2e-5, atol=2e-5)
    assert way == ("position 0 is hidden, as by padding on the left, and may be read" if mask == "left" else "packed")


@torch.no_grad()
def test_only_tokens_are_embedded(family):
    accelerated, batch = accelerate(build(family)), inputs("right")
    assert ids_embedded(lambda: accelerated(**batch)) == [int(batch["attention_mask"].sum())] * 3


@torch.no_grad()
def test_given_positions_types_and_embeddings(family, path_of):
    model = build(family, type_vocab_size=2)
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs("right")
    mask = {"attention_mask": batch["attention_mask"]}
    variants = [
        batch | {"position_ids": torch.randint(0, 40, (4, 9))},
        batch | {"position_ids": torch.randint(0, 40, (1, 9)), "token_type_ids": torch.randint(0, 2, (4, 9))},
        mask | {"inputs_embeds": torch.randn(4, 9, 32)},
    ]
    for arguments in variants:
        expected = model(**arguments).last_hidden_state
        assert path_of(accelerated, **arguments) == "packed"
        assert_same_at_real_positions(accelerated(**arguments).last_hidden_state, expected, mask)


@torch.no_grad()
def test_more_tokens_than_positions_are_an_error_as_before(family):
    model = build(family)
    accelerated = accelerate(copy.deepcopy(model))
    fits, too_long = torch.randint(2, 100, (1, 38)), torch.randint(2, 100, (1, 39))
    torch.testing.assert_close(accelerated(fits)[0], model(fits)[0], rtol=2e-5, atol=2e-5)
    with pytest.raises((IndexError, RuntimeError)) as expected:
        model(too_long)
    with pytest.raises(expected.type, match="index"):
        accelerated(too_long)


HEADS = ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering"]


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_heads(family, head, path_of):
    model = build(family, head)
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs("right")
    expected = model(**batch)
    actual = accelerated(**batch)
    assert path_of(accelerated, **batch) == "packed"
    real = batch["attention_mask"].bool()
    for name, value in expected.items():
        of_tokens = value.shape[:2] == real.shape
        ours, theirs = (t[real] if of_tokens else t for t in (actual[name], value))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_training(family):
    model = build(family, "ForSequenceClassification").train()
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs("right") | {"labels": torch.tensor([0, 1, 1, 0])}
    for each in (model, accelerated):
        each(**batch).loss.backward()
    for (name, expected), actual in zip(model.named_parameters(), accelerated.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_what_is_replaced_survives_copies_and_pickles_and_is_put_back(family):
    model = build(family)
    kinds = [type(module) for module in model.modules()]
    accelerated = accelerate(copy.deepcopy(model))
    kinds_replaced = {item.original.__name__.removeprefix(family) for item in report(accelerated).replaced}
    assert kinds_replaced >= {"Embeddings", "Encoder", "SelfOutput", "Output"}
    again = pickle.loads(pickle.dumps(accelerated))
    batch = inputs("right")
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], accelerated(**batch)[0])
    assert again.state_dict().keys() == model.state_dict().keys()
    assert [type(module) for module in restore(again).modules()] == kinds


def test_a_decoder_is_left_alone(family):
    model = accelerate(build(family, "ForCausalLM", is_decoder=True))
    reasons = {item.name: item.reason for item in report(model).left_alone}
    assert any("decoder" in reason for reason in reasons.values())
    assert not any("Encoder" in item.original.__name__ for item in report(model).replaced)
