# SPDX-License-Identifier: BSD-3-Clause
"""Accelerated CamemBERT, ELECTRA, ERNIE and BART's encoder against transformers. What they share with BERT,
test_bert_*.py tests there; what they share with all models, whatever runs over families.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers.models.bart.modeling_bart import BartEncoder

from resnorm_ext.integrations import accelerate, report, restore

from .conftest import MASKS, assert_same_at_real_positions, tiny_config
from .test_bart import PAD, bart_config, inputs

HIDDEN = "position 0 is hidden, as by padding on the left, and may be read"
PREFIXES = {"CamemBERT": "Camembert", "ELECTRA": "Electra", "ERNIE": "Ernie", "BART": "Bart"}
CHANGES = {"ELECTRA": {"embedding_size": 24}, "ERNIE": {"use_task_id": True}}
close = torch.testing.assert_close


def build(family: str, head: str = "Model", **changes) -> nn.Module:
    if family == "BART":
        config = bart_config(**changes)
        return (BartEncoder if head == "Model" else getattr(transformers, f"Bart{head}"))(config).eval()
    sizes = tiny_config(pad_token_id=PAD).to_dict() | CHANGES.get(family, {}) | changes
    config = getattr(transformers, f"{PREFIXES[family]}Config")(**{k: v for k, v in sizes.items() if k != "model_type"})
    return getattr(transformers, PREFIXES[family] + head)(config).eval()


@pytest.fixture(params=PREFIXES)
def family(request) -> str:
    return request.param


@pytest.fixture
def pair(family) -> tuple[nn.Module, nn.Module]:
    model = build(family)
    return model, accelerate(copy.deepcopy(model))


def check(pair, batch, ways_of, way: str = "packed", tolerance: float = 2e-5) -> None:
    outputs = []
    assert ways_of(lambda: outputs.append(pair[1](**batch))) == {way}
    assert_same_at_real_positions(outputs[0][0], pair[0](**batch)[0], batch, tolerance)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_inference(pair, mask, implementation, ways_of):
    for each in pair:
        each.set_attn_implementation(implementation)
    check(pair, inputs(mask), ways_of, HIDDEN if mask == "left" else "packed")


@torch.no_grad()
def test_bfloat16(pair, ways_of):
    for each in pair:
        each.bfloat16()
    exact_model, errors = copy.deepcopy(pair[0]).double(), torch.zeros(2, dtype=torch.float64)
    for _ in range(8):
        batch = inputs("right")
        real, exact = batch["attention_mask"].bool(), exact_model(**batch)[0]
        assert ways_of(pair[1], **batch) == {"packed"}
        errors += torch.stack([(each(**batch)[0].double() - exact)[real].square().mean() for each in pair])
    assert 0 < errors[1] <= 1.1 * errors[0]


@torch.no_grad()
def test_what_is_replaced_survives_copies_and_pickles_and_is_put_back(pair):
    model, accelerated = pair
    batch = inputs("right")
    for again in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
        assert len(report(again).replaced) == len(report(accelerated).replaced) > 0
        assert torch.equal(again(**batch)[0], accelerated(**batch)[0])
        assert again.state_dict().keys() == model.state_dict().keys()
        restore(again)
        assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(again(**batch)[0], model(**batch)[0])


@torch.no_grad()
def test_a_hook_within_a_layer_is_called(pair):
    model, accelerated = pair
    batch = inputs("right")
    for each in pair:
        calls = []
        layers = next(module for module in each.modules() if isinstance(module, nn.ModuleList))
        linear = next(module for module in layers[1].modules() if isinstance(module, nn.Linear))
        linear.register_forward_hook(lambda *args, calls=calls: calls.append(1) or 2 * args[2])
        each(**batch)
        assert calls == [1]
    assert_same_at_real_positions(accelerated(**batch)[0], model(**batch)[0], batch)


@torch.no_grad()
def test_hidden_states(pair, ways_of):
    batch = inputs("right")
    expected, actual = (each(**batch, output_hidden_states=True) for each in pair)
    assert len(expected.hidden_states) > 2
    close(actual.hidden_states, expected.hidden_states, rtol=2e-5, atol=2e-5)
    check(pair, batch, ways_of)  # and nothing of it is left


HEADS = [(family, head) for family in PREFIXES for head in ("ForSequenceClassification", "ForTokenClassification")]
HEADS[-1] = ("BART", "ForConditionalGeneration")  # which has no other head for tokens


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_heads_and_training(family, head):
    model = build(family, head)
    pair, batch = (model, accelerate(copy.deepcopy(model))), inputs("right")
    batch["labels"] = torch.randint(0, 2, (4,) if head == "ForSequenceClassification" else (4, 9))
    with torch.no_grad():
        expected, actual = (each(**batch) for each in pair)
    close(actual.loss, expected.loss, rtol=2e-5, atol=2e-5)
    close(actual.logits, expected.logits, rtol=2e-5, atol=2e-5)  # the loss reads all of them
    for each in pair:
        each.train()(**batch).loss.backward()
    for (name, theirs), ours in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("how", ["compile", "export"])
@torch.no_grad()
def test_traced_calls_are_one_operator(pair, how):
    model, accelerated = pair
    nodes = []

    def backend(graph, example_inputs):
        nodes.extend(graph.graph.nodes)
        return graph

    if how == "compile":
        traced = torch.compile(accelerated, fullgraph=True, backend=backend)
    else:
        exported = torch.export.export(accelerated, (), inputs("right"))
        nodes, traced = exported.graph.nodes, exported.module()
    for mask in ("right", "holes", "left"):
        batch = inputs(mask)
        assert_same_at_real_positions(traced(**batch)[0], model(**batch)[0], batch)
    assert sum("resnorm.encode" in str(node.target) for node in nodes) == 1


@torch.no_grad()
def test_electra_whose_embeddings_are_as_wide_as_its_layers(ways_of):
    model = build("ELECTRA", embedding_size=32)
    assert not hasattr(model, "embeddings_project")
    for mask in ("none", "right"):
        check((model, accelerate(copy.deepcopy(model))), inputs(mask), ways_of)


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook"])
@torch.no_grad()
def test_electras_projection_with_a_hook(kind):
    model, shapes = build("ELECTRA"), []
    accelerated = accelerate(copy.deepcopy(model))
    project = accelerated.embeddings_project
    getattr(project, f"register_{kind}")(lambda *args: shapes.append(args[1][0].shape))
    batch = inputs("right")
    assert_same_at_real_positions(accelerated(**batch)[0], model(**batch)[0], batch)
    assert shapes == [(4, 9, 24)]  # what the original is given
    project._forward_hooks.clear()
    project._forward_pre_hooks.clear()
    project.register_forward_hook(lambda module, args, output: 2 * output)
    model.embeddings_project.register_forward_hook(lambda module, args, output: 2 * output)
    assert_same_at_real_positions(accelerated(**batch)[0], model(**batch)[0], batch)


@pytest.mark.parametrize("use_task_id", [True, False])
@torch.no_grad()
def test_ernies_tasks(use_task_id, ways_of):
    model = build("ERNIE", use_task_id=use_task_id)
    pair, batch = (model, accelerate(copy.deepcopy(model))), inputs("holes")
    check(pair, batch, ways_of)
    tasks = torch.randint(0, 3, (4, 9))
    check(pair, batch | {"task_type_ids": tasks, "token_type_ids": torch.randint(0, 2, (4, 9))}, ways_of)
    check(pair, batch | {"task_type_ids": tasks[:1]}, ways_of)
    by_position = [batch["input_ids"], batch["attention_mask"], None, tasks]
    close(*(each(*by_position).pooler_output for each in pair), rtol=2e-5, atol=2e-5)
    changes = (model(*by_position)[0] - model(**batch)[0]).abs().max()
    assert (changes > 0.1) == use_task_id
