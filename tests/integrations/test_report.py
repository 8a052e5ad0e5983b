# SPDX-License-Identifier: BSD-3-Clause
"""What ``report`` says of calls, of encoders that are not known, and of what holds a model."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings

import pytest
import torch
import transformers
from torch import nn

from resnorm_ext.integrations import accelerate, refresh, report, restore

from .conftest import inputs, tiny_config
from .families import FAMILIES, output_of


@pytest.fixture
def bert() -> transformers.BertModel:
    return accelerate(transformers.BertModel(tiny_config()).eval())


def encoder_of(model):
    (item,) = [item for item in report(model).replaced if item.original.__name__ == "BertEncoder"]
    return item


class TestCalls:
    def test_are_counted_by_path_and_reason(self, bert):
        assert encoder_of(bert).calls == {} and "calls:" not in str(report(bert))
        with torch.no_grad():
            for _ in range(2):
                bert(**inputs())
            bert(**inputs("left"))
        hidden = "position 0 is hidden, as by padding on the left, and may be read"
        assert encoder_of(bert).calls == {("packed", None): 2, ("original", hidden): 1}
        assert encoder_of(bert).last == ("original", hidden)
        text = str(report(bert))
        assert "BertEncoder: 2 packed\n" in text
        assert f"BertEncoder: 1 original, because {hidden} (the last call)" in text

    def test_grad_mode_says_what_to_do(self, bert):
        bert(**inputs())
        reason = "grad mode is on and layer.0.attention.self.query.weight requires grad: use torch.no_grad()"
        assert encoder_of(bert).last == ("original", reason)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_of_every_family(self, name):
        model = accelerate(FAMILIES[name].build())
        with torch.no_grad():
            output_of(model, FAMILIES[name].batch(model))
        assert "calls:" in str(report(model)) and "(the last call)" in str(report(model))

    def test_copies_pickles_and_accelerating_anew_begin_without(self, bert):
        with torch.no_grad():
            bert(**inputs())
        for twin in (copy.deepcopy(bert), pickle.loads(pickle.dumps(bert)), accelerate(restore(bert))):
            assert encoder_of(twin).calls == {}
            with torch.no_grad():
                twin(**inputs())
            assert sum(encoder_of(twin).calls.values()) == 1


class TestWarning:
    def calls(self, model, count: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                model(**inputs())
        return [str(each.message) for each in caught if "accelerated" in str(each.message)]

    def test_once_a_model_after_three_calls_in_a_row(self, bert):
        assert self.calls(bert, 2) == []
        (message,) = self.calls(bert, 5)
        assert "3 calls in a row of the accelerated BertEncoder, in eval mode" in message
        assert "use torch.no_grad()" in message and "resnorm_ext.report(model)" in message
        assert self.calls(bert, 5) == []
        assert len(self.calls(copy.deepcopy(bert), 3)) == 1

    def test_not_in_training(self, bert):
        assert self.calls(bert.train(), 5) == []

    def test_not_where_a_call_between_was_fast(self, bert):
        for _ in range(3):
            assert self.calls(bert, 2) == []
            with torch.no_grad():
                bert(**inputs())

    def test_once_for_all_layers(self):
        family = FAMILIES["ViT"]
        model = accelerate(family.build())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                output_of(model, family.batch(model))
        assert len([each for each in caught if "accelerated ViTLayer" in str(each.message)]) == 1

    def test_not_where_padding_is_computed_by_default(self):
        family = FAMILIES["nn.TransformerEncoder"]
        model = accelerate(family.build())
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            for _ in range(4):
                output_of(model, family.batch(model))


class TestPadding:
    @pytest.mark.parametrize("padding", ["auto", "skip", "compute"])
    @pytest.mark.parametrize("name", ["BERT", "DistilBERT", "nn.TransformerEncoder", "nn.TransformerEncoderLayer"])
    def test_which_it_is_and_what_another_would_bring(self, name, padding):
        result = report(accelerate(FAMILIES[name].build(), padding=padding))
        assert {item.padding for item in result.replaced} <= {padding, None}
        lines = [line for line in str(result).splitlines() if f'("{padding}")' in line]
        assert lines and all("which" in line or '; "' in line for line in lines)


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (transformers.AlbertConfig(hidden_size=64, num_attention_heads=2, intermediate_size=64), "AlbertLayer"),
        (
            transformers.CLIPTextConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2),
            "CLIPEncoderLayer x 2",
        ),
        (
            transformers.T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=2, d_kv=32),
            "T5LayerSelfAttention x 4 (encoder.block.0",
        ),
    ],
    ids=lambda each: type(each).__name__ if not isinstance(each, str) else "",
)
def test_encoders_that_are_not_known_are_named(config, layer):
    model = transformers.AutoModel.from_config(config).eval()
    text = str(report(accelerate(model)))
    assert layer in text and "not known; known are" in text and "distilbert" in text
    assert len(text.splitlines()) <= 25
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        assert "LayerNorm alone gains next to nothing" in text


def test_known_encoders_are_not_named_so():
    for family in FAMILIES.values():
        text = str(report(accelerate(family.build())))
        assert "not known" not in text and "gains next to nothing" not in text


def test_the_text_fits_a_screen():
    model = nn.ModuleList(nn.TransformerDecoderLayer(8, 2, 8) for _ in range(30))
    model.extend(type(f"Layer{i}", (nn.TransformerEncoderLayer,), {})(8, 2, 8) for i in range(30))
    lines = str(report(accelerate(model))).splitlines()
    assert len(lines) <= 24 and any(line.startswith("  and ") and line.endswith(" more") for line in lines)


class Holder:
    def __init__(self, **modules):
        self.__dict__.update(modules)


class TestWhatHoldsAModel:
    def test_a_pipeline(self):
        config = transformers.BertConfig(**tiny_config().to_dict())
        model = transformers.BertForSequenceClassification(config).eval()
        pipeline = Holder(model=model, same=model, tokenizer=object())
        assert accelerate(pipeline) is pipeline
        assert type(model.bert.encoder).__module__.startswith("resnorm_ext")
        assert str(report(pipeline)) == str(report(model))
        assert refresh(pipeline) is pipeline
        assert restore(pipeline) is pipeline and not report(pipeline).replaced

    @pytest.mark.parametrize("function", [accelerate, restore, report, refresh])
    def test_several_models_are_named(self, function):
        holder = Holder(student=nn.LayerNorm(3), teacher=nn.LayerNorm(3))
        with pytest.raises(TypeError, match=r"got Holder, which holds modules as \.student and \.teacher: pass one"):
            function(holder)
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, but got Holder$"):
            function(Holder())


def test_a_transformers_that_is_too_old_is_named_once(monkeypatch):
    model = nn.ModuleList([nn.LayerNorm(8), transformers.BertModel(tiny_config())])
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    result = report(accelerate(model))
    assert type(model[1].encoder) is transformers.models.bert.modeling_bert.BertEncoder
    reason = "transformers 4.57.1 is installed, and 5.2 or newer is needed"
    assert [item.reason for item in result.left_alone].count(reason) == 1 and str(result).count(reason) == 1
