# SPDX-License-Identifier: BSD-3-Clause
"""An accelerated GPT-2 against transformers: prompts, cached tokens, padding."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.gpt2 import modeling_gpt2

from resnorm_ext import functional
from resnorm_ext.integrations import accelerate, report, restore

MASKS = {
    "none": None,
    "full": [[1] * 9] * 3,
    "left": [[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]],
    "right": [[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8],
}


def build(head: str = "Model", **changes) -> torch.nn.Module:
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    config = transformers.GPT2Config(**(sizes | quiet | {"pad_token_id": 0, "bos_token_id": 1} | changes))
    return getattr(transformers, f"GPT2{head}")(config).eval()


def batch_of(mask: str) -> dict[str, torch.Tensor]:
    batch = {"input_ids": torch.randint(1, 100, (3, 9))}
    if MASKS[mask] is not None:
        batch["attention_mask"] = torch.tensor(MASKS[mask])
    return batch


def assert_same(actual: torch.Tensor, expected: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
    real = batch.get("attention_mask", torch.ones(actual.shape[:2])).bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=5e-5, atol=5e-5)


@pytest.fixture
def attentions(monkeypatch) -> list[str]:
    """Which attention ran, in order."""
    log = []

    def logged(name, function):
        return lambda *args, **kwargs: log.append(name) or function(*args, **kwargs)

    monkeypatch.setattr(functional, "packed_attention", logged("packed", functional.packed_attention))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", logged("sdpa", sdpa))
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


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@torch.no_grad()
def test_generation(mask, cache, implementation):
    model = build("LMHeadModel")
    model.set_attn_implementation(implementation)
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of(mask)
    how = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    how |= {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    expected, actual = model.generate(**batch, **how), accelerated.generate(**batch, **how)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prompt_in_two_parts():
    model = build()
    accelerated, ids = accelerate(copy.deepcopy(model)), torch.randint(1, 100, (2, 9))
    first = accelerated(ids[:, :5])
    second = accelerated(ids[:, 5:], past_key_values=first.past_key_values)
    both = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    torch.testing.assert_close(both, model(ids).last_hidden_state, rtol=5e-5, atol=5e-5)


@torch.no_grad()
def test_an_encoder_decoder_cache():
    model = build()
    accelerated, ids = accelerate(copy.deepcopy(model)), torch.randint(1, 100, (2, 9))
    outputs = []
    for each in (model, accelerated):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        outputs.append([each(part, past_key_values=cache).last_hidden_state for part in (ids[:, :5], ids[:, 5:])])
    for expected, actual in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-5)


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


@torch.no_grad()
def test_beam_search():
    model = build("LMHeadModel")
    accelerated, batch = accelerate(copy.deepcopy(model)), batch_of("left")
    how = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(accelerated.generate(**batch, **how), model.generate(**batch, **how))


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
