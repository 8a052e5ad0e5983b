# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from gpt import GPT
from torch.profiler import profile

from .gpt_cases import CONTEXT, SHAPES, SIZES, gpt2_names, is_transposed, model_of, packed, plain_rms, to_gpt2


@pytest.mark.parametrize(("layers", "heads", "width", "lengths"), SHAPES)
def test_hidden_states_are_those_of_gpt2(layers: int, heads: int, width: int, lengths: list[int]):
    model = model_of(layers=layers, heads=heads, width=width).eval()
    gpt2 = to_gpt2(model).eval()
    ids, _, bounds = packed(lengths)
    with torch.no_grad():
        expected = [gpt2.transformer(each.unsqueeze(0)).last_hidden_state[0] for each in ids.split(lengths)]
        torch.testing.assert_close(model.hidden_states(ids, bounds), torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layers", "heads", "width", "lengths"), SHAPES)
def test_loss_and_gradients_are_those_of_gpt2(layers: int, heads: int, width: int, lengths: list[int]):
    model = model_of(layers=layers, heads=heads, width=width).train()
    gpt2, names = to_gpt2(model).train(), gpt2_names(model)
    ids, labels, bounds = packed(lengths)
    loss = model(ids, bounds, labels=labels).loss
    logits = torch.cat([gpt2(each.unsqueeze(0)).logits[0] for each in ids.split(lengths)])
    expected = F.cross_entropy(logits, labels, ignore_index=-100)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    theirs = dict(gpt2.transformer.named_parameters())
    assert set(names.values()) == set(theirs)
    for name, parameter in model.named_parameters():
        grad = theirs[names[name]].grad
        grad = grad.t() if is_transposed(names[name]) else grad
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("layers", "heads", "width", "lengths"), SHAPES)
def test_rms_is_a_plain_torch_model(layers: int, heads: int, width: int, lengths: list[int]):
    model = model_of(rms=True, layers=layers, heads=heads, width=width)
    ids, _, bounds = packed(lengths)
    with torch.no_grad():
        inferred = model.eval().hidden_states(ids, bounds)
    ours = model.train().hidden_states(ids, bounds)
    expected = torch.cat([plain_rms(model, each) for each in ids.split(lengths)])
    for output in (inferred, ours):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*model.named_parameters())
    weights = torch.randn_like(ours)
    grads = [torch.autograd.grad((output * weights).sum(), parameters) for output in (ours, expected)]
    for name, one, other in zip(names, *grads):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rms", [False, True])
def test_training_takes_the_fast_paths(rms: bool, caplog: pytest.LogCaptureFixture):
    model = model_of(rms=rms, dropout=0.1).train()
    ids, labels, bounds = packed([CONTEXT, 7, CONTEXT])
    with profile() as profiler, caplog.at_level(logging.DEBUG, "resnorm_ext"):
        model(ids, bounds, labels=labels).loss.backward()
    assert caplog.messages == ([] if rms else ["TransformerEncoder: packed"])
    calls = {event.key: event.count for event in profiler.key_averages()}
    norm, layers = "add_rms_norm" if rms else "add_layer_norm", SIZES["layers"]
    for name, count in (("packed_attention", layers), ("feed_forward", layers), (norm, 2 * layers)):
        assert calls[f"resnorm::{name}"] == count, name
    assert calls["aten::bernoulli_"] == 1  # of the embeddings' dropout
    assert not any("softmax" in name and "log" not in name for name in calls)


@pytest.mark.parametrize("rms", [False, True])
def test_dropout_is_where_gpt2_has_it(rms: bool):
    """By how far hidden states scatter, which any other place of it changes."""
    draws, length, dropout = 3000, 4, 0.3
    model = model_of(rms=rms, dropout=dropout, layers=1).train()
    ids = torch.tensor([3, 1, 4, 1])
    bounds = torch.arange(draws + 1, dtype=torch.int32) * length
    with torch.no_grad():
        ours = model.hidden_states(ids.repeat(draws), bounds).unflatten(0, (draws, length))
        if rms:
            theirs = torch.stack([plain_rms(model, ids, dropout) for _ in range(draws)])
        else:
            theirs = to_gpt2(model, dropout).train().transformer(ids.expand(draws, -1)).last_hidden_state
    assert (ours.std(0) / theirs.std(0)).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("rms", [False, True])
def test_it_begins_as_gpt2_does(rms: bool):
    torch.manual_seed(0)
    model, layers = GPT(256, context=128, layers=8, heads=4, width=192, rms=rms), 8
    seen = set()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            scaled = name.endswith(("out_proj.weight", "linear2.weight"))
            seen.add((name.rpartition(".layers.")[2].partition(".")[2] if "layers" in name else name, scaled))
            std = 0.02 / math.sqrt(2 * layers) if scaled else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < std / 20, name
    assert len(seen) == 6 and sum(scaled for _, scaled in seen) == 2
