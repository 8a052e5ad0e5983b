# SPDX-License-Identifier: BSD-3-Clause
"""Classes and functions of the libraries that somebody has replaced: what they do is what an accelerated model does,
for as long as they are there."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from resnorm_ext.integrations import accelerate

from .conftest import tiny_config
from .families import FAMILIES, MASK, assert_same, output_of, taken

FAST = {("packed", None), ("fused", None), ("padded", "padding is computed, or its mask is more than that")}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def pair(family) -> tuple[nn.Module, nn.Module]:
    torch.backends.mha.set_fastpath_enabled(False)  # which ignores what is put in the place of functions
    model = family.build()
    yield model, accelerate(copy.deepcopy(model))
    torch.backends.mha.set_fastpath_enabled(True)


def doubled(function):
    """``function`` with a result twice as large, in whatever form it comes."""

    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if isinstance(result, tuple):
            return (2 * result[0], *result[1:])
        if isinstance(result, transformers.utils.ModelOutput):
            first = next(iter(result))
            result[first] = 2 * result[first]
            return result
        return 2 * result

    return call


FUNCTIONS = [
    (nn.LayerNorm, "forward"),
    (nn.Dropout, "forward"),
    (F, "layer_norm"),
    (F, "scaled_dot_product_attention"),
    (F, "dropout"),
]


def check(family, pair, owner, name, monkeypatch, grad: bool) -> None:
    model, accelerated = pair
    batch = family.batch(model)
    with torch.set_grad_enabled(grad):
        plain = output_of(model, batch)
        assert_same(output_of(accelerated, batch), plain)
        before = taken(accelerated)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, doubled(getattr(owner, name)))
            expected, actual = output_of(model, batch), output_of(accelerated, batch)
        assert_same(actual, expected)
        # And as before once they are as they were.
        assert_same(output_of(accelerated, batch), plain)
        assert taken(accelerated) == before
        assert grad or before <= FAST


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("place", FUNCTIONS, ids=lambda place: f"{place[0].__name__}.{place[1]}")
def test_functions_of_torch(family, pair, place, grad, monkeypatch):
    check(family, pair, *place, monkeypatch, grad)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_forwards_of_the_classes(family, pair, grad, monkeypatch):
    for class_ in family.classes:
        check(family, pair, class_, "forward", monkeypatch, grad)


class Doubled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function in (F.linear, F.layer_norm, torch.addmm) else result


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_a_mode_for_torchs_functions(family, pair, grad):
    model, accelerated = pair
    batch = family.batch(model)
    with torch.set_grad_enabled(grad):
        plain = output_of(accelerated, batch)
        with Doubled():
            expected, actual = output_of(model, batch), output_of(accelerated, batch)
        assert not torch.allclose(expected, plain)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        torch.testing.assert_close(output_of(accelerated, batch), plain, rtol=0, atol=0)


@torch.no_grad()
def test_a_default_device_is_not_such_a_mode(family, pair):
    """Nothing may be made there: the model and its input are on the CPU. (Left padding and ids; embeddings below.)"""
    model, accelerated = pair
    batch = family.batch(model)
    expected = output_of(model, batch)
    with torch.device("meta"):
        actual = output_of(accelerated, batch)
    assert_same(actual, expected)
    assert taken(accelerated) <= FAST


@pytest.mark.parametrize(
    "name", ["BERT", "RoBERTa", "XLM-RoBERTa", "CamemBERT", "ELECTRA", "ERNIE", "BART", "DistilBERT"]
)
@pytest.mark.parametrize("mask", [None, MASK])
@torch.no_grad()
def test_embeddings_given_beside_a_default_device(name, mask):
    model = FAMILIES[name].build()
    width = model.get_input_embeddings().embedding_dim
    accelerated, embeddings = accelerate(copy.deepcopy(model)), torch.randn(3, 9, width)
    expected = model(inputs_embeds=embeddings, attention_mask=mask)[0]
    with torch.device("meta"):
        actual = accelerated(inputs_embeds=embeddings, attention_mask=mask)[0]
    assert_same(actual, expected)


@torch.no_grad()
def test_the_report_says_which_function(monkeypatch):
    accelerated = accelerate(FAMILIES["BERT"].build())
    monkeypatch.setattr(nn.LayerNorm, "forward", doubled(nn.LayerNorm.forward))
    output_of(accelerated, FAMILIES["BERT"].batch(accelerated))
    assert ("original", "LayerNorm.forward has been replaced") in taken(accelerated)


@pytest.mark.parametrize("when", ["before the package is imported", "after"])
def test_replaced_before_accelerate(when):
    """Of a library that was imported and changed before, too."""
    program = f"""if True:
        import copy, torch, transformers
        from transformers.models.bert import modeling_bert
        def change():
            old = modeling_bert.BertSelfAttention.forward
            def doubled(self, *args, **kwargs):
                result = old(self, *args, **kwargs)
                return 2 * result[0], result[1]
            modeling_bert.BertSelfAttention.forward = doubled
        if {when != "after"}:
            change()
        import resnorm_ext
        if {when == "after"}:
            change()
        config = transformers.BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                         intermediate_size=64, initializer_range=0.3)
        model, ids = transformers.BertModel(config).eval(), torch.randint(1, 100, (2, 9))
        accelerated = resnorm_ext.accelerate(copy.deepcopy(model))
        with torch.no_grad():
            torch.testing.assert_close(accelerated(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-4)
        reasons = {{item.last for item in resnorm_ext.report(accelerated).replaced if item.last}}
        assert reasons == {{("original", "BertSelfAttention.forward has been replaced")}}, reasons
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_replaced_before_compiling(monkeypatch):
    """And put back after it."""
    norm, x = accelerate(nn.Sequential(nn.LayerNorm(8))), torch.randn(2, 8)
    compiled, plain = torch.compile(norm, backend="eager", fullgraph=True), norm(x)
    torch.testing.assert_close(compiled(x), plain)
    with monkeypatch.context() as patch:
        patch.setattr(F, "layer_norm", lambda x, *_: 7 * x)
        torch.testing.assert_close(compiled(x), 7 * x)
    torch.testing.assert_close(compiled(x), plain)


class TestAttentionOfOneLayer:
    """Whose config is a copy of its own."""

    @pytest.fixture(autouse=True)
    def mine(self):
        def attend(module, query, key, value, mask, **kwargs):
            return 2 * sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0], None

        transformers.AttentionInterface.register("mine", attend)
        transformers.AttentionMaskInterface.register("mine", transformers.masking_utils.sdpa_mask)

    @pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
    @pytest.mark.parametrize("implementation", ["mine", "eager"])
    @pytest.mark.parametrize("index", [0, 1])
    @pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("nn.")])
    def test_is_respected(self, name, index, implementation, grad):
        family = FAMILIES[name]
        model = family.build()
        accelerated = accelerate(copy.deepcopy(model))
        batch = family.batch(model)
        if implementation == "eager":  # which adds a mask that sdpa takes for bool
            batch[1].pop("attention_mask", None)
        with torch.set_grad_enabled(grad):
            plain = output_of(accelerated, batch)
            for each in (model, accelerated):
                attention = next(m for m in family.layer(each, index).modules() if hasattr(m, "scaling"))
                attention.config = copy.deepcopy(attention.config)
                attention.config._attn_implementation = implementation
            expected = output_of(model, batch)
            assert_same(output_of(accelerated, batch), expected)
            assert implementation == "eager" or not torch.allclose(expected, plain)


def test_one_layer_may_get_another_implementation_later():
    model = transformers.BertModel(tiny_config()).eval()
    accelerated, ids = accelerate(copy.deepcopy(model)), torch.randint(1, 100, (2, 9))
    with torch.no_grad():
        accelerated(ids)
        attention = accelerated.encoder.layer[1].attention.self
        attention.config = copy.deepcopy(attention.config)
        accelerated(ids)
        assert taken(accelerated) == {("packed", None)}
        attention.config._attn_implementation = "eager"
        torch.testing.assert_close(accelerated(ids)[0], model(ids)[0], rtol=2e-5, atol=2e-5)
        assert taken(accelerated) == {("original", "the attention implementations are eager and sdpa")}
