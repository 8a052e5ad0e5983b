# SPDX-License-Identifier: BSD-3-Clause
"""An accelerated GPT-2 against transformers where it generates: caches, tokens after a prompt, ways to decode."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, QuantizedCache, StaticCache

from resnorm_ext.integrations import accelerate

from .gpt2_cases import MASKS, batch_of, build


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def build_pair(implementation: str = "sdpa", **changes) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model and its accelerated copy."""
    model = build("LMHeadModel", **changes)
    model.set_attn_implementation(implementation)
    return model, accelerate(copy.deepcopy(model))


def assert_generate_the_same(pair, batch, **how) -> None:
    how = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True} | how
    outputs = []
    for each in pair:
        torch.manual_seed(3)
        outputs.append(each.generate(**batch, **how))
    expected, actual = outputs
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", ["none", "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generation(mask, cache, implementation):
    how = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    assert_generate_the_same(build_pair(implementation), batch_of(mask), **how)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mask", ["none", "left"])
def test_generation_with_a_sliding_window(mask, cache):
    pair = build_pair(sliding_window=5)
    assert_generate_the_same(pair, batch_of(mask), cache_implementation=cache)


@pytest.mark.parametrize("mask", ["none", "left", "right"])
def test_sampling(mask):
    assert_generate_the_same(build_pair(), batch_of(mask), do_sample=True, top_k=20, temperature=0.8)


@pytest.mark.parametrize("mask", ["none", "left", "right"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_beam_search(mask, do_sample):
    """In which the cache's rows change places."""
    assert_generate_the_same(build_pair(), batch_of(mask), max_new_tokens=8, num_beams=3, do_sample=do_sample)


@pytest.mark.parametrize("mask", ["none", "left"])
def test_a_prompt_in_chunks(mask):
    assert_generate_the_same(build_pair(), batch_of(mask), prefill_chunk_size=4)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_assisted_decoding(layers, implementation):
    """An assistant with all layers guesses every token; what one with a single layer guesses leaves the cache again."""
    model, accelerated = build_pair(implementation)
    batch = {"input_ids": torch.randint(1, 100, (1, 9))}
    expected = model.generate(**batch, max_new_tokens=12, do_sample=False)
    for each in (model, accelerated):
        assistant = copy.deepcopy(each)
        del assistant.transformer.h[layers:]
        assistant.config.n_layer = layers
        assistant.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
        assisted = each.generate(**batch, max_new_tokens=12, do_sample=False, assistant_model=assistant)
        assert torch.equal(assisted, expected)


def test_guesses_from_the_prompt():
    pair, repeated = build_pair(), torch.randint(1, 100, (1, 4)).repeat(1, 4)
    assert_generate_the_same(pair, {"input_ids": repeated}, prompt_lookup_num_tokens=3)


def fp8_cache(config):
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this release of transformers has no cache in fp8")
    return QuantizedCache("fp8", config)


CACHES = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic, of the config": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=20),
    "static, full at the end": lambda config: StaticCache(config, max_cache_len=9),
    "encoder-decoder": lambda config: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "fp8": fp8_cache,
}
PARTS = {"one token at a time": range(1, 10), "several tokens": (3, 7, 8, 9), "all at once": (9,)}


def logits_of_parts(model, batch, cache, ends) -> torch.Tensor:
    """Those of a prompt that is given in parts, up to each of ``ends``."""
    begin, logits = 0, []
    for end in ends:
        part = {name: value[:, :end] for name, value in batch.items()}
        part["input_ids"] = part["input_ids"][:, begin:]
        logits.append(model(**part, past_key_values=cache, use_cache=True).logits)
        begin = end
    return torch.cat(logits, 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_prompt_in_parts(cache, parts, mask, implementation):
    model, accelerated = build_pair(implementation)
    batch = batch_of(mask)
    expected, actual = (
        logits_of_parts(each, batch, CACHES[cache](each.config), PARTS[parts]) for each in (model, accelerated)
    )
    real = batch.get("attention_mask", torch.ones(3, 9)).bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
    if cache != "fp8":  # which rounds
        torch.testing.assert_close(actual[real], model(**batch).logits[real], rtol=1e-4, atol=1e-4)


class HalvingCache(DynamicCache):
    def update(self, keys, values, *args, **kwargs):
        return super().update(keys / 2, values / 2, *args, **kwargs)


class HalvingLayer(DynamicLayer):
    def update(self, keys, values, *args, **kwargs):
        return super().update(keys / 2, values / 2, *args, **kwargs)


class BorrowedCache:
    """Has what the model calls, and is no ``Cache``."""

    is_compileable = False

    def __init__(self) -> None:
        inner = DynamicCache()
        self.get_seq_length, self.get_mask_sizes = inner.get_seq_length, inner.get_mask_sizes
        self.get_query_offset = getattr(inner, "get_query_offset", None)
        self.update = lambda keys, values, *args: inner.update(keys / 2, values / 2, *args)


def cache_of_halving_layers():
    cache = DynamicCache()
    cache.layers = [HalvingLayer() for _ in range(3)]
    return cache


def cache_whose_method_is_its_own():
    cache = DynamicCache()
    update = cache.update
    cache.update = lambda keys, values, *args: update(keys / 2, values / 2, *args)
    return cache


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("make", [HalvingCache, BorrowedCache, cache_of_halving_layers, cache_whose_method_is_its_own])
def test_a_cache_that_gives_back_something_else(make, parts):
    model, accelerated = build_pair()
    batch = batch_of("none")
    expected, actual = (logits_of_parts(each, batch, make(), PARTS[parts]) for each in (model, accelerated))
    assert (expected - model(**batch).logits).abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
