# SPDX-License-Identifier: BSD-3-Clause
"""Heads on packed encoders: results at real positions, and losses, are the original's; where a loss reads padded
positions these are computed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from resnorm_ext.integrations import accelerate, restore
from resnorm_ext.integrations.stack import reads_padding

from .conftest import MASKS
from .families import taken

LABELS = {
    "ForSequenceClassification": {"labels": torch.tensor([0, 1, 0, 1])},
    "ForTokenClassification": {"labels": torch.ones(4, 9, dtype=torch.long)},
    "ForMaskedLM": {"labels": torch.randint(3, 100, (4, 9), generator=torch.Generator().manual_seed(0))},
    "ForQuestionAnswering": {
        "start_positions": torch.tensor([2, 1, 0, 3]),
        "end_positions": torch.tensor([3, 2, 0, 5]),
    },
}
PADDED = "the loss reads padded positions"
HIDDEN_FIRST = "position 0 is hidden, as by padding on the left, and may be read"


@pytest.fixture(params=["Bert", "Roberta", "XLMRoberta", "DistilBert"])
def family(request) -> str:
    return request.param


def build(family: str, head: str) -> nn.Module:
    sizes = {"vocab_size": 100, "max_position_embeddings": 40, "pad_token_id": 1, "initializer_range": 0.3}
    if family == "DistilBert":
        sizes |= {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**sizes)).eval()


def batch_of(mask: str) -> dict[str, torch.Tensor]:
    attention_mask = torch.tensor(MASKS[mask])
    ids = torch.randint(3, 100, (4, 9)).masked_fill(attention_mask == 0, 1)
    return {"input_ids": ids, "attention_mask": attention_mask}


def compare(family, head, mask, labels, grad=False, **options) -> set:
    model = build(family, head)
    accelerated, batch = accelerate(copy.deepcopy(model), **options), batch_of(mask)
    with torch.set_grad_enabled(grad):
        expected, actual = model(**batch, **labels), accelerated(**batch, **labels)
    if labels:
        torch.testing.assert_close(actual.loss, expected.loss, rtol=2e-4, atol=2e-4)
    real = batch["attention_mask"].bool()
    for name in expected.keys() - {"loss"}:
        by_position = expected[name].shape[:2] == real.shape
        got, wanted = (each[name][real] if by_position else each[name] for each in (actual, expected))
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)
    assert reads_padding.get() == ()
    return taken(accelerated)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("labelled", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("mask", ["right", "left", "holes"])
@pytest.mark.parametrize("head", LABELS)
def test_results_and_losses(family, head, mask, labelled, grad):
    path = compare(family, head, mask, LABELS[head] if labelled else {}, grad)
    if not grad and mask != "left":
        reads = labelled and head != "ForSequenceClassification"
        assert path == {("original", PADDED) if reads else ("packed", None)}
    elif not grad:
        assert path == {("original", HIDDEN_FIRST)}


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMaskedLM"])
@torch.no_grad()
def test_labels_that_leave_padding_out_need_none(family, head):
    labels = LABELS[head]["labels"].masked_fill(torch.tensor(MASKS["right"]) == 0, -100)
    assert compare(family, head, "right", {"labels": labels}) == {("packed", None)}


class Around(nn.Module):
    """Its own loss on the logits of a head that is given no labels."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input_ids, attention_mask, labels):
        logits = self.net(input_ids, attention_mask=attention_mask).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class OneHot(Around):
    """Labels of another shape."""

    def forward(self, input_ids, attention_mask, labels):
        logits = self.net(input_ids, attention_mask=attention_mask).logits
        return nn.functional.binary_cross_entropy_with_logits(logits, nn.functional.one_hot(labels, 2).float())


class Flat(Around):
    def forward(self, input_ids, attention_mask, labels):
        return self.net(input_ids, attention_mask=attention_mask, labels=labels.flatten()).loss


class FourDimensions(Around):
    def forward(self, input_ids, attention_mask, labels):
        return self.net(input_ids, attention_mask=attention_mask.bool()[:, None, None], labels=labels).loss


@pytest.mark.parametrize("kind", [Around, OneHot, Flat, FourDimensions])
@torch.no_grad()
def test_losses_of_other_kinds(family, kind):
    model = kind(build(family, "ForTokenClassification")).eval()
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("right")
    for labels in (LABELS["ForTokenClassification"]["labels"], torch.zeros(4, 9, dtype=torch.long)):
        expected, actual = model(**batch, labels=labels), accelerated(**batch, labels=labels)
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)
    assert reads_padding.get() == ()


@torch.no_grad()
def test_an_interrupt_leaves_nothing_that_lasts(family):
    model = accelerate(build(family, "ForTokenClassification"))
    batch, labels = batch_of("right"), LABELS["ForTokenClassification"]["labels"]

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.classifier.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch, labels=labels)
    handle.remove()
    model(**batch)
    assert reads_padding.get() == () and taken(model) == {("packed", None)}


@torch.no_grad()
def test_without_padding_there_is_none_to_read(family):
    assert compare(family, "ForTokenClassification", "full", LABELS["ForTokenClassification"]) == {("packed", None)}


@torch.no_grad()
def test_multiple_choice(family):
    model = build(family, "ForMultipleChoice")
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("right")
    batch = {name: tensor.view(2, 2, 9) for name, tensor in batch.items()}
    expected, actual = (each(**batch, labels=torch.tensor([0, 1])) for each in (model, accelerated))
    torch.testing.assert_close(actual.loss, expected.loss, rtol=2e-4, atol=2e-4)
    assert taken(accelerated) == {("packed", None)}


@pytest.mark.parametrize("padding", ["skip", "compute"])
@torch.no_grad()
def test_choices(family, padding):
    model = build(family, "ForTokenClassification")
    accelerated, batch = accelerate(copy.deepcopy(model), padding=padding), batch_of("right")
    expected, actual = (each(**batch, **LABELS["ForTokenClassification"]) for each in (model, accelerated))
    if padding == "skip":
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(actual.logits[real], expected.logits[real], rtol=2e-4, atol=2e-4)
        assert taken(accelerated) == {("packed", None)}
    else:
        torch.testing.assert_close((actual.loss, actual.logits), (expected.loss, expected.logits), rtol=2e-4, atol=2e-4)
        assert taken(accelerated) == {("original", "padding is to be computed")}


@torch.no_grad()
def test_positional_labels_and_errors(family):
    """A call that fails asks nothing of the next one."""
    model = accelerate(build(family, "ForTokenClassification"))
    batch, labels = batch_of("right"), LABELS["ForTokenClassification"]["labels"]
    with pytest.raises((ValueError, RuntimeError)):
        model(**batch, labels=labels[:, :5].repeat(1, 2)[:, :9], inputs_embeds=torch.ones(1))
    assert reads_padding.get() == ()
    model(**batch)
    assert taken(model) == {("packed", None)}


class Tagger(nn.Module):
    """A user's own head."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(32, 5)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.classifier(self.encoder(input_ids, attention_mask=attention_mask)[0])
        return logits if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@torch.no_grad()
def test_heads_of_users(family):
    model = Tagger(build(family, "Model")).eval()
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("right")
    labels = torch.ones(4, 9, dtype=torch.long)
    expected, actual = model(**batch, labels=labels), accelerated(**batch, labels=labels)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)
    assert taken(accelerated) == {("original", PADDED)}
    accelerated(**batch)
    assert taken(accelerated) == {("packed", None)}


def test_hooks_are_put_once_and_taken_off(family):
    model = build(family, "ForTokenClassification")
    accelerated = accelerate(accelerate(copy.deepcopy(model)))
    twin = pickle.loads(pickle.dumps(accelerated))
    for each in (accelerated, twin):
        assert len(each._forward_pre_hooks) == len(each._forward_hooks) == 1
        restore(each)
        for module in each.modules():
            assert not (module._forward_pre_hooks or module._forward_hooks or module._forward_hooks_always_called)
            assert not any("resnorm" in key for key in vars(module))


@torch.no_grad()
def test_arguments_that_no_layer_reads(family):
    """As the Trainer passes when it evaluates."""
    model = accelerate(build(family, "ForSequenceClassification"))
    batch = batch_of("right") | {"labels": torch.tensor([0, 1, 0, 1]), "num_items_in_batch": torch.tensor(4)}
    model(**batch)
    assert taken(model) == {("packed", None)}


@torch.no_grad()
def test_arguments_that_a_layer_reads(family):
    model = build(family, "Model")
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("full")
    bias = torch.randn(4, 4, 9, 9)
    expected, actual = (each(**batch, position_bias=bias)[0] for each in (model, accelerated))
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(expected, model(**batch)[0])


@pytest.mark.parametrize("head", LABELS)
@torch.no_grad()
def test_losses_of_traced_calls(family, head):
    """No value of a label may be read there, so padding is computed wherever a loss may read it."""
    model = build(family, head)
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("right") | LABELS[head]
    expected = model(**batch).loss
    compiled = torch.compile(accelerated, backend="eager")
    torch.testing.assert_close(compiled(**batch).loss, expected, rtol=2e-4, atol=2e-4)
    program = torch.export.export(accelerated, (), batch)
    torch.testing.assert_close(program.module()(**batch).loss, expected, rtol=2e-4, atol=2e-4)
    packs = "resnorm.encode.default" in [str(node.target) for node in program.graph.nodes]
    assert packs == (head == "ForSequenceClassification")
