# SPDX-License-Identifier: BSD-3-Clause
"""Dropout in training on packed batches: each at its own rate, distributed as the original's, and the same again where
a computation is repeated from the same state of the generator."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from resnorm_ext.integrations import accelerate

from .families import taken
from .packed_cases import (
    FAMILIES,
    PACKED,
    assert_same_step,
    batch_of,
    build,
    calls,
    encoder_model,
    pair_of,
    sequence_loss,
    step,
)

KINDS = ("embeddings", "attention weights", "updates")
SAMPLES = 4000


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def kind_of(name: str) -> str:
    if "embeddings" in name:
        return "embeddings"
    return "attention weights" if re.search(r"attention(\.self)?\.dropout", name) else "updates"


def with_dropout(model: nn.Module, p: float, *kinds: str) -> nn.Module:
    """``model``, whose encoder's dropouts of these kinds, or all, act at the rate ``p``."""
    found = {name: each for name, each in encoder_model(model).named_modules() if isinstance(each, nn.Dropout)}
    assert {kind_of(name) for name in found} == set(KINDS)
    for name, each in found.items():
        if kind_of(name) in (kinds or KINDS):
            each.p = p
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_acts_and_follows_the_seed(family, kind):
    loss = sequence_loss()
    without = accelerate(build(family), padding="skip")
    model = with_dropout(accelerate(build(family), padding="skip"), 0.3, kind)
    model.load_state_dict(without.state_dict())
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(step(model, loss))
    assert taken(model) == PACKED
    first, again, other = results
    assert torch.equal(first[0], again[0]) and all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    undropped = loss(without)
    assert len({float(each) for each in (first[0], other[0], undropped)}) == 3


@pytest.mark.parametrize("p", [0.1, 0.4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["BERT", "DistilBERT"])
def test_moments_are_the_originals(family, kind, p):
    """One sentence many times over, with padding."""
    assert_same_moments(*(with_dropout(each, p, kind) for each in pair_of(build(family, "Model"))))


@pytest.mark.parametrize("family", ["BERT", "DistilBERT"])
def test_moments_in_eval_mode_with_dropouts_that_train(family):
    """As Monte Carlo dropout has it: the attention's acts in the mode of the attention, not its own."""
    pair = [with_dropout(each, 0.2) for each in pair_of(build(family, "Model"))]
    for each in pair:
        each.eval()
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.train()
    assert_same_moments(*pair)


def assert_same_moments(model: nn.Module, accelerated: nn.Module) -> None:
    sentence = torch.tensor([[2, 17, 40, 3, 1, 1]]).expand(SAMPLES, -1)
    mask, moments = (sentence != 1).long(), []
    for each in (model, accelerated):
        output = each(sentence, attention_mask=mask)[0].detach()[:, :4].double()
        moments.append((output.mean(0), output.var(0), (output - output.mean(0)).pow(4).mean(0)))
    assert {way for way, _ in taken(accelerated)} == {"packed"}
    (mean, variance, fourth), (our_mean, our_variance, _) = moments
    assert variance.max() > 1e-4
    assert ((our_mean - mean).abs() <= 5 * (2 * variance / SAMPLES).sqrt()).all()
    standard_error = (2 * (fourth - variance.square()) / SAMPLES).sqrt()
    assert ((our_variance - variance).abs() <= 5 * standard_error).all()


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_the_backward_pass_drops_what_the_forward_pass_did(family, use_reentrant):
    """Against differences of the loss, in a direction that all parameters take part in."""
    model, loss = with_dropout(accelerate(build(family), padding="skip"), 0.3).double(), sequence_loss()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    _, gradients = step(model, loss)
    assert taken(model) == PACKED
    directions = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    derivative = sum((gradients[name] * direction).sum() for name, direction in directions.items())
    values, size = [], 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(directions[name], alpha=sign * size)
        torch.manual_seed(5)
        values.append(loss(model).detach())
    difference = (values[0] - values[1]) / (2 * size)
    torch.testing.assert_close(derivative, difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["BERT", "DistilBERT"])
def test_checkpointing_changes_nothing(family, kind, use_reentrant):
    model, loss, results = with_dropout(accelerate(build(family), padding="skip"), 0.3, kind), sequence_loss(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        loss_value, gradients = step(model, loss)
        results.append((loss_value, {name: each.clone() for name, each in gradients.items() if each is not None}))
        assert taken(model) == PACKED
    assert_same_step(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(9, 4, 1, 8), None], ids=["padding", "none"])
@pytest.mark.parametrize("padding", ["skip", "auto"])
def test_a_pass_without_grad_drops_the_same(padding, lengths, kind):
    """GradCache, reentrant checkpoints and sentence-transformers' cached losses compute a batch once without grad and
    again with it, from the same state of the generator."""
    batch = batch_of(lengths)
    for each in pair_of(build(), padding):
        with_dropout(each, 0.3, kind)
        torch.manual_seed(0)
        with torch.no_grad():
            first = each(**batch).logits
        torch.manual_seed(0)
        torch.testing.assert_close(each(**batch).logits, first, rtol=2e-5, atol=2e-5)


def test_a_reentrant_checkpoint_of_the_whole_model_drops_the_same():
    mask, labels = batch_of()["attention_mask"], torch.tensor([0, 1, 0, 1])
    embeds = torch.randn(4, 9, 32).requires_grad_()
    for each in pair_of(build()):
        with_dropout(each, 0.3)

        def run(embeds, model=each):
            return model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss

        torch.manual_seed(0)
        loss = run(embeds)
        torch.manual_seed(0)
        checkpointed = torch.utils.checkpoint.checkpoint(run, embeds, use_reentrant=True)
        torch.testing.assert_close(checkpointed, loss, rtol=2e-6, atol=2e-6)


def test_rates_may_change_between_calls():
    model, loss = accelerate(build(), padding="skip"), sequence_loss()
    without = loss(model)
    with_dropout(model, 0.5)
    assert loss(model) != loss(model)
    with_dropout(model, 0.0)
    assert torch.equal(loss(model), without)
    with_dropout(model, 0.5)
    model.eval()
    assert torch.equal(loss(model), without)
    assert {way for way, _ in calls(model)} == {"packed"}
