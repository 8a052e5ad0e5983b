# SPDX-License-Identifier: BSD-3-Clause
"""An accelerated DistilBERT against transformers. What it shares with BERT, test_bert_*.py tests there."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import transformers
from transformers.models.distilbert import modeling_distilbert

from resnorm_ext.integrations import accelerate, report, restore

from .conftest import MASKS, assert_same_at_real_positions, ids_embedded, inputs, square_masks


def build(head: str = "Model", **changes) -> torch.nn.Module:
    sizes = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40}
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "initializer_range": 0.3}
    config = transformers.DistilBertConfig(**(sizes | quiet | changes))
    return getattr(transformers, f"DistilBert{head}")(config).eval()


def batch_of(mask: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in inputs(mask).items() if name != "token_type_ids"}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_inference(mask, implementation, path_of):
    model = build()
    model.set_attn_implementation(implementation)
    accelerated = accelerate(copy.deepcopy(model))
    batch = batch_of(mask)
    outputs = []
    way = path_of(lambda: outputs.append(accelerated(**batch)))
    expected = model(**batch)
    assert_same_at_real_positions(outputs[0].last_hidden_state, expected.last_hidden_state, batch)
    assert way == ("position 0 is hidden, as by padding on the left, and may be read" if mask == "left" else "packed")


@torch.no_grad()
def test_only_tokens_are_embedded():
    accelerated, batch = accelerate(build()), batch_of("holes")
    assert ids_embedded(lambda: accelerated(**batch)) == [int(batch["attention_mask"].sum())] * 2


@torch.no_grad()
def test_no_mask_of_length_by_length_is_made():
    model, batch = build(), batch_of("holes")
    assert square_masks(model, batch) == {(4, 1, 9, 9)}
    assert not square_masks(accelerate(model), batch)


@torch.no_grad()
def test_arguments(path_of):
    model = build()
    accelerated = accelerate(copy.deepcopy(model))
    batch = batch_of("right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    embeds, positions = torch.randn(4, 9, 32), torch.randint(0, 40, (4, 9))
    for args, kwargs in (
        ((ids, mask), {}),
        ((ids, mask, None, positions), {}),
        ((ids,), {"attention_mask": mask, "position_ids": positions[:1]}),
        ((None, mask, embeds), {"position_ids": positions}),
        ((), {"inputs_embeds": embeds, "attention_mask": mask}),
    ):
        expected = model(*args, **kwargs).last_hidden_state
        outputs = []
        assert path_of(lambda *a, **k: outputs.append(accelerated(*a, **k)), *args, **kwargs) == "packed"  # noqa: B023
        assert_same_at_real_positions(outputs[0].last_hidden_state, expected, {"attention_mask": mask})
    for wrong in (
        {"input_ids": ids, "inputs_embeds": embeds},
        {},
        {"input_ids": torch.zeros(1, 41, dtype=torch.long)},
    ):
        with pytest.raises(Exception) as expected:
            model(**wrong)
        with pytest.raises(expected.type, match=re.escape(str(expected.value))):
            accelerated(**wrong)


@torch.no_grad()
def test_embeddings_that_are_not_as_built_are_not_packed(path_of):
    """The encoder is, all the same."""
    model = build()
    model.embeddings.register_forward_hook(lambda module, args, output: 2 * output)
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("right")
    assert path_of(accelerated, **batch) == "packed"
    expected = model(**batch).last_hidden_state
    assert_same_at_real_positions(accelerated(**batch).last_hidden_state, expected, batch)


def without_positions(embeddings) -> None:
    del embeddings.position_ids


def with_a_table_that_is_not_read(embeddings) -> None:
    embeddings.token_type_embeddings = torch.nn.Embedding(2, 32)


@pytest.mark.parametrize("change", [without_positions, with_a_table_that_is_not_read])
@torch.no_grad()
def test_embeddings_of_more_or_less(change, path_of):
    model = build()
    change(model.embeddings)
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("right")
    assert path_of(accelerated, **batch) == "packed"
    expected = model(**batch).last_hidden_state
    assert_same_at_real_positions(accelerated(**batch).last_hidden_state, expected, batch)


@torch.no_grad()
def test_a_layer_of_another_kind(path_of):
    class Halve(torch.nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states / 2

    for layers in ([Halve()], [Halve(), build().transformer.layer[0]], []):
        expected = "layer.0 is a .*Halve, not a DistilBertBlock" if layers else "there is no layer"
        model = build()
        model.transformer.layer = torch.nn.ModuleList(layers)
        accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("right")
        assert re.fullmatch(expected, path_of(accelerated, **batch))
        torch.testing.assert_close(accelerated(**batch)[0], model(**batch)[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.no_grad()
def test_bfloat16_and_activations(activation, path_of):
    model = build(activation=activation).bfloat16()
    accelerated = accelerate(copy.deepcopy(model))
    batch = batch_of("right")
    assert path_of(accelerated, **batch) == "packed"
    exact = copy.deepcopy(model).float()(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    errors = [
        (each(**batch).last_hidden_state.float() - exact)[real].pow(2).mean().sqrt() for each in (model, accelerated)
    ]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"])
@torch.no_grad()
def test_heads(head, path_of):
    model = build(head)
    accelerated = accelerate(copy.deepcopy(model))
    batch = batch_of("right")
    assert path_of(accelerated, **batch) == "packed"
    expected, actual = model(**batch).logits, accelerated(**batch).logits
    if head != "ForSequenceClassification":
        real = batch["attention_mask"].bool()
        expected, actual = expected[real], actual[real]
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def ask_for_hidden_states(model, call) -> None:
    call["output_hidden_states"] = True


def turn_grad_on(model, call) -> None:
    torch.set_grad_enabled(True)


def hook_a_linear(model, call) -> None:
    model.transformer.layer[1].ffn.lin1.register_forward_hook(lambda *_: None)


def override_the_feed_forward(model, call) -> None:
    ffn = model.transformer.layer[0].ffn
    ffn.ff_chunk = ffn.ff_chunk


def train(model, call) -> None:
    model.train()


OBSTACLES = {
    ask_for_hidden_states: "hidden states or attention weights are asked for",
    turn_grad_on: "grad mode is on and layer.0.attention.q_lin.weight requires grad: use torch.no_grad()",
    hook_a_linear: "layer.1.ffn.lin1 has hooks, a forward or tensors of its own",
    override_the_feed_forward: "layer.0.ffn has a ff_chunk of its own",
    train: "layer.0 is in training: dropout acts",
}


@pytest.mark.parametrize("change", OBSTACLES)
def test_what_asks_for_the_original_computation_gets_it(change, path_of):
    model, call = accelerate(build(dropout=0.1)), batch_of("right")
    with torch.no_grad():
        change(model, call)
        assert path_of(model, **call) == OBSTACLES[change]


@torch.no_grad()
def test_hidden_states_and_attentions():
    model = build()
    model.set_attn_implementation("eager")
    accelerated = accelerate(copy.deepcopy(model))
    batch = batch_of("right") | {"output_hidden_states": True, "output_attentions": True}
    expected, actual = model(**batch), accelerated(**batch)
    for name in ("hidden_states", "attentions"):
        assert len(actual[name]) == len(expected[name])
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training(dropout):
    model = build("ForSequenceClassification", dropout=dropout).train()
    accelerated = accelerate(copy.deepcopy(model))
    batch = batch_of("right") | {"labels": torch.tensor([0, 1, 1, 0])}
    for each in (model, accelerated):
        torch.manual_seed(1)
        each(**batch).loss.backward()
    for (name, expected), actual in zip(model.named_parameters(), accelerated.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_compiles_without_a_break():
    model = build()
    batch = batch_of("right")
    with torch.no_grad():
        compiled = torch.compile(accelerate(copy.deepcopy(model)), fullgraph=True)
        expected = model(**batch).last_hidden_state
        assert_same_at_real_positions(compiled(**batch).last_hidden_state, expected, batch)


@torch.no_grad()
def test_what_is_replaced_survives_copies_and_pickles_and_is_put_back():
    model = build()
    kinds = [type(module) for module in model.modules()]
    accelerated = accelerate(copy.deepcopy(model))
    replaced = [item.original for item in report(accelerated).replaced]
    assert replaced.count(modeling_distilbert.TransformerBlock) == 2
    assert replaced.count(modeling_distilbert.Transformer) == 1
    assert replaced.count(modeling_distilbert.Embeddings) == 1
    assert report(accelerated).linear_backends.keys() and not report(accelerated).left_alone
    again = pickle.loads(pickle.dumps(accelerated))
    batch = batch_of("right")
    assert torch.equal(again(**batch)[0], accelerated(**batch)[0])
    assert again.state_dict().keys() == model.state_dict().keys()
    assert [type(module) for module in restore(again).modules()] == kinds
