# SPDX-License-Identifier: BSD-3-Clause
"""An accelerated GPT-2 against transformers: prompts, masks, configurations."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2

from resnorm_ext import functional
from resnorm_ext.integrations import accelerate, eligibility, report, restore

from .gpt2_cases import MASKS, assert_same, batch_of, build


@pytest.fixture
def attentions(monkeypatch) -> list[str]:
    """Which attention ran, in order."""
    log = []

    def logged(name, function):
        return lambda *args, **kwargs: log.append(name) or function(*args, **kwargs)

    monkeypatch.setattr(functional, "packed_attention", logged("packed", functional.packed_attention))
    # As transformers' own: another, or another function in torch, would be respected.
    sdpa = logged("sdpa", sdpa_attention_forward)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sdpa)
    monkeypatch.setattr(eligibility, "sdpa_attention_forward", sdpa)
    return log


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_prompts(mask, use_cache, implementation, attentions):
    model = build()
    model.set_attn_implementation(implementation)
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of(mask)
    expected = model(**batch, use_cache=use_cache)
    attentions.clear()
    actual = accelerated(**batch, use_cache=use_cache)
    assert_same(actual.last_hidden_state, expected.last_hidden_state, batch)
    packed = ["packed"] * 3
    assert attentions == (packed if mask in ("none", "full") else ["sdpa"] * 3 if implementation == "sdpa" else [])
    if use_cache:
        real = batch.get("attention_mask", torch.ones(3, 9)).bool()
        for ours, theirs in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
            for name in ("keys", "values"):
                kept = [getattr(layer, name).transpose(1, 2)[real] for layer in (ours, theirs)]
                torch.testing.assert_close(*kept, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"activation_function": "relu"},
        {"n_inner": 48},
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_configurations(changes, implementation):
    model = build(**changes)
    model.set_attn_implementation(implementation)
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("none")
    assert_same(accelerated(**batch).last_hidden_state, model(**batch).last_hidden_state, batch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("by", ["argument", "config"])
@torch.no_grad()
def test_attention_that_is_not_causal(by, implementation):
    model = build(is_causal=False) if by == "config" else build()
    model.set_attn_implementation(implementation)
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("none")
    how = {"is_causal": False} if by == "argument" else {}
    expected = model(**batch, **how).last_hidden_state
    assert (expected - build_causal(model)(**batch).last_hidden_state).abs().max() > 0.1
    assert_same(accelerated(**batch, **how).last_hidden_state, expected, batch)


def build_causal(model):
    causal = build()
    causal.load_state_dict(model.state_dict())
    return causal


LOWER = torch.ones(9, 9, dtype=torch.bool).tril()
FIRST = torch.arange(9) == 0


@pytest.mark.parametrize(
    ("implementation", "mask"),
    [
        ("sdpa", LOWER[None, None]),
        ("sdpa", FIRST[None, None, None].expand(3, 1, 1, 9)),
        ("sdpa", (LOWER | LOWER.roll(1, 1))[None, None]),
        ("eager", LOWER[None, None].float()),
        ("eager", torch.zeros(1, 1, 9, 9).masked_fill(~LOWER, torch.finfo(torch.float32).min)),
        ("eager", (~LOWER[None, None]).long() * -1000),
    ],
)
@torch.no_grad()
def test_masks_of_four_dimensions(implementation, mask):
    model = build()
    model.set_attn_implementation(implementation)
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("none")
    actual, expected = (each(**batch, attention_mask=mask).last_hidden_state for each in (accelerated, model))
    assert_same(actual, expected, batch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_positions_that_restart_part_sequences(rows, implementation):
    model = build()
    model.set_attn_implementation(implementation)
    accelerated, ids = accelerate(copy.deepcopy(model)), batch_of("none")["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], list(range(9)), [5, 6, 7, 8, 9, 3, 4, 5, 6]])[:rows]
    expected = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    actual = accelerated(ids, position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-5)
    alone = model(ids[:1, 4:7]).last_hidden_state
    torch.testing.assert_close(actual[:1, 4:7], alone, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_positions_that_restart_part_nothing_where_there_is_a_cache(implementation, attentions):
    model = build()
    model.set_attn_implementation(implementation)
    accelerated, ids = accelerate(copy.deepcopy(model)), batch_of("none")["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    expected = model(ids, position_ids=positions, use_cache=True).last_hidden_state
    attentions.clear()
    actual = accelerated(ids, position_ids=positions, use_cache=True).last_hidden_state
    assert attentions == ["packed"] * 3
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-5)


@torch.no_grad()
def test_several_threads():
    """The first calls prepare the weights at the same time."""
    model = build()
    accelerated = accelerate(copy.deepcopy(model))
    batches = [batch_of("none") for _ in range(16)]
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(torch.no_grad()(lambda batch: accelerated(**batch).last_hidden_state), batches))
    for output, batch in zip(outputs, batches, strict=True):
        assert_same(output, model(**batch).last_hidden_state, batch)


@torch.no_grad()
def test_bfloat16(attentions):
    model = build().bfloat16()
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("none")
    exact = copy.deepcopy(model).float()(**batch).last_hidden_state
    expected = model(**batch).last_hidden_state
    attentions.clear()
    actual = accelerated(**batch).last_hidden_state
    assert attentions == ["packed"] * 3
    errors = [(each.float() - exact).pow(2).mean().sqrt() for each in (expected, actual)]
    assert errors[1] <= 1.1 * errors[0]


@torch.no_grad()
def test_changed_weights_are_seen():
    model = build()
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("none")
    accelerated(**batch)
    for each in (model, accelerated):
        each.h[1].mlp.c_fc.weight.mul_(0.5)
        each.h[1].attn.c_attn.weight.mul_(0.5)
    assert_same(accelerated(**batch).last_hidden_state, model(**batch).last_hidden_state, batch)


@torch.no_grad()
def test_hidden_states_and_attentions():
    model = build()
    model.set_attn_implementation("eager")
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("none")
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected, actual = model(**batch, **asked), accelerated(**batch, **asked)
    for name in ("hidden_states", "attentions"):
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=5e-5)


def test_training():
    model = build("LMHeadModel").train()
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("full")
    for each in (model, accelerated):
        each(**batch, labels=batch["input_ids"]).loss.backward()
    for (name, expected), actual in zip(model.named_parameters(), accelerated.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_cross_attention_is_left_alone():
    model = build(add_cross_attention=True)
    accelerated = accelerate(copy.deepcopy(model))
    reasons = {item.name: item.reason for item in report(accelerated).left_alone}
    assert reasons == {f"h.{i}": "cross-attention" for i in range(3)}
    batch, encoded = batch_of("none"), torch.randn(3, 4, 32)
    actual, expected = (each(**batch, encoder_hidden_states=encoded)[0] for each in (accelerated, model))
    assert_same(actual, expected, batch)


def test_compiles_without_a_break():
    model = build()
    with torch.no_grad():
        compiled = torch.compile(accelerate(copy.deepcopy(model)), fullgraph=True)
        batch = batch_of("none")
        assert_same(compiled(**batch, use_cache=False)[0], model(**batch, use_cache=False)[0], batch)


@torch.no_grad()
def test_what_is_replaced_survives_copies_and_pickles_and_is_put_back():
    model = build()
    kinds = [type(module) for module in model.modules()]
    accelerated = accelerate(copy.deepcopy(model))
    assert [item.original for item in report(accelerated).replaced].count(modeling_gpt2.GPT2Block) == 3
    assert {shape[1:] for shape in report(accelerated).linear_backends} == {(32, 96), (32, 32), (32, 128), (128, 32)}
    again = pickle.loads(pickle.dumps(accelerated))
    batch = batch_of("none")
    assert torch.equal(again(**batch)[0], accelerated(**batch)[0])
    assert again.state_dict().keys() == model.state_dict().keys()
    assert [type(module) for module in restore(again).modules()] == kinds


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", ["left", "holes", "right"])
@torch.no_grad()
def test_what_is_read_at_padding(mask, implementation):
    """A language model's loss reads before each label, other heads the mean of all positions, and a cache is there for
    calls with another mask."""
    batch = batch_of(mask)
    for head, changes in (("LMHeadModel", {}), ("DoubleHeadsModel", {"summary_type": "mean", "num_labels": 1})):
        model = build(head, **changes)
        model.set_attn_implementation(implementation)
        accelerated = accelerate(copy.deepcopy(model))
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        expected, actual = (each(**batch, labels=labels) for each in (model, accelerated))
        torch.testing.assert_close(actual.loss, expected.loss, rtol=5e-5, atol=5e-5)
        if "mc_logits" in expected:
            torch.testing.assert_close(actual.mc_logits, expected.mc_logits, rtol=5e-5, atol=5e-5)
        follow = torch.tensor([[7], [8], [9]])
        expected, actual = (
            each(follow, past_key_values=each(**batch).past_key_values).logits for each in (model, accelerated)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["cache", "mask"])
def test_gradients_of_what_the_attention_reads_beside_its_input(what):
    """As in prefix tuning: the model is frozen."""
    model = build().requires_grad_(False)
    accelerated = accelerate(copy.deepcopy(model))
    ids, gradients = torch.tensor([[5, 6, 7]]), []
    for each in (model, accelerated):
        torch.manual_seed(0)
        heads, head_dim = each.config.n_head, each.config.n_embd // each.config.n_head
        prefix = torch.randn(1, heads, 2, head_dim).requires_grad_(what == "cache")
        mask = torch.zeros(1, 1, 3, 5).requires_grad_(what == "mask")
        cache = DynamicCache()
        for index in range(each.config.n_layer):
            cache.update(prefix, prefix, index)
        with torch.enable_grad():
            each(ids, past_key_values=cache, attention_mask=mask)[0].sum().backward()
        gradients.append(prefix.grad if what == "cache" else mask.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
