# SPDX-License-Identifier: BSD-3-Clause
"""What accelerate, restore and report do to a model as an object."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.bert import modeling_bert

import resnorm_ext.modules
from resnorm_ext.integrations import accelerate, refresh, report, restore

from .conftest import assert_same_at_real_positions, inputs, tiny_config


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def attributes(model: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def torch_encoder(**options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False).eval()


MODELS = {
    "BertModel": lambda: transformers.BertModel(tiny_config()),
    "BertForMaskedLM": lambda: transformers.BertForMaskedLM(tiny_config()),
    "TransformerEncoder": torch_encoder,
    "Transformer": lambda: nn.Transformer(32, 4, 2, 2, 64),
    "LayerNorm": lambda: nn.LayerNorm(32),
    "RMSNorm": lambda: nn.RMSNorm(32),
}


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_restore_puts_everything_back(self, name):
        model = MODELS[name]()
        before = classes(model), attributes(model), {k: v.clone() for k, v in model.state_dict().items()}
        hooks = {
            n: (dict(m._forward_pre_hooks), dict(m._forward_pre_hooks_with_kwargs)) for n, m in model.named_modules()
        }
        assert accelerate(model) is model
        assert classes(model) != before[0]
        assert restore(model) is model
        assert (classes(model), attributes(model)) == before[:2]
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before[2].items())
        for n, m in model.named_modules():
            assert (dict(m._forward_pre_hooks), dict(m._forward_pre_hooks_with_kwargs)) == hooks[n]

    def test_a_second_call_changes_nothing(self, name):
        model = accelerate(MODELS[name]())
        before = classes(model), attributes(model), str(report(model))
        hooks = {n: dict(m._forward_pre_hooks) for n, m in model.named_modules()}
        accelerate(model)
        assert (classes(model), attributes(model), str(report(model))) == before
        assert {n: dict(m._forward_pre_hooks) for n, m in model.named_modules()} == hooks
        restore(model)
        assert classes(model) == classes(MODELS[name]())

    def test_state_dict(self, name):
        model = MODELS[name]()
        accelerated = accelerate(copy.deepcopy(model))
        assert list(accelerated.state_dict()) == list(model.state_dict())
        assert [n for n, _ in accelerated.named_parameters()] == [n for n, _ in model.named_parameters()]
        twin = accelerate(MODELS[name]())
        twin.load_state_dict(model.state_dict())
        model.load_state_dict(twin.state_dict())

    def test_class_names_and_subclasses(self, name):
        """Tools find modules by either, as for wrapping policies."""
        model = MODELS[name]()
        before = classes(model)
        for module_name, module in accelerate(model).named_modules():
            assert isinstance(module, before[module_name])
            assert type(module).__name__ in (before[module_name].__name__, "SelfAttention")

    def test_other_instances_are_left_alone(self, name):
        bystander = MODELS[name]()
        before = classes(bystander)
        accelerate(MODELS[name]())
        assert classes(bystander) == before == classes(MODELS[name]())

    def test_copies_and_pickles(self, name):
        model = accelerate(MODELS[name]())
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(saved, weights_only=False),
        ):
            assert classes(twin) == classes(model)
            assert str(report(twin)) == str(report(model))
            assert classes(restore(twin)) == classes(MODELS[name]())


def test_no_head_and_no_config_is_touched():
    model = transformers.BertForMaskedLM(tiny_config())
    before = model.config.to_dict()
    accelerate(model)
    assert type(model) is transformers.BertForMaskedLM
    assert type(model.bert).__bases__[-1] is transformers.BertModel and type(model.bert).__name__ == "BertModel"
    assert model.config.to_dict() == before and model.config is model.bert.config


def test_modules_that_a_user_built_of_ours_stay():
    model = nn.Sequential(resnorm_ext.modules.LayerNorm(8), nn.LayerNorm(8))
    restore(accelerate(model))
    assert classes(model)["0"] is resnorm_ext.modules.LayerNorm
    assert classes(model)["1"] is nn.LayerNorm


def test_save_pretrained(tmp_path, tiny):
    batch = inputs()
    with torch.no_grad():
        expected = tiny(**batch).last_hidden_state
        accelerate(tiny).save_pretrained(tmp_path)
        loaded = transformers.AutoModel.from_pretrained(tmp_path)
        assert classes(loaded) == classes(restore(tiny))
        assert_same_at_real_positions(loaded(**batch).last_hidden_state, expected, batch)


@pytest.mark.parametrize("function", [accelerate, restore, report])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, but got int"):
        function(1)


class TestReport:
    def test_of_a_model_that_is_not_accelerated(self, tiny):
        result = report(tiny)
        assert not result.replaced and not result.linear_backends
        assert {item.reason for item in result.left_alone} == {"accelerate() has not been called"}

    def test_names_what_was_replaced(self, pair):
        tiny, accelerated = pair
        result = report(accelerated)
        was, now = classes(tiny), classes(accelerated)
        assert {item.name for item in result.replaced} == {name for name in was if was[name] is not now[name]}
        for item in result.replaced:
            assert (item.original, item.replacement) == (was[item.name], now[item.name])
        assert {"encoder", "embeddings", "embeddings.LayerNorm"} <= {item.name for item in result.replaced}
        assert "BertOutput x 2 (encoder.layer.0.output, ...)" in str(result)

    def test_says_which_library_multiplies(self, pair):
        result = report(pair[1])
        shapes = {(shape.in_features, shape.out_features) for shape in result.linear_backends}
        assert shapes == {(32, 96), (32, 32), (32, 64), (64, 32)}
        assert set(result.linear_backends.values()) <= {"aten", "onednn", "resnorm"}
        assert "32 -> 96 float32: " in str(result)

    def test_says_what_keeps_the_encoder_from_its_fast_path(self, pair):
        linear = pair[1].encoder.layer[1].output.dense
        linear.register_forward_hook(lambda *_: None)
        (encoder,) = [item for item in report(pair[1]).replaced if item.name == "encoder"]
        assert encoder.reason.startswith("layer.1.output.dense has hooks")
        assert encoder.reason in str(report(pair[1]))

    def test_decoder_is_left_alone(self):
        model = transformers.BertLMHeadModel(tiny_config(is_decoder=True, add_cross_attention=True))
        result = report(accelerate(model))
        assert type(model.bert.encoder) is modeling_bert.BertEncoder
        assert type(model.bert.embeddings) is modeling_bert.BertEmbeddings
        reasons = {item.name: item.reason for item in result.left_alone}
        assert "decoder" in reasons["bert"]
        assert reasons["bert.encoder.layer.0.crossattention.self"] == "cross-attention"

    def test_torch_decoder_and_lone_attention_are_left_alone(self):
        model = accelerate(
            nn.ModuleDict({"transformer": nn.Transformer(32, 4, 1, 1, 64), "lone": nn.MultiheadAttention(8, 2)})
        )
        reasons = {item.name: item.reason for item in report(model).left_alone}
        assert "cross-attention" in reasons["transformer.decoder"]
        assert "key and value" in reasons["transformer.decoder.layers.0.multihead_attn"]
        assert "key and value" in reasons["lone"]
        assert type(model["lone"]) is nn.MultiheadAttention
        assert type(model["transformer"].decoder.layers[0]) is nn.TransformerDecoderLayer

    def test_subclasses_are_left_alone(self):
        class OtherNorm(nn.LayerNorm):
            def forward(self, input):
                return input

        model = nn.Sequential(OtherNorm(8))
        assert "subclass of nn.LayerNorm" in report(accelerate(model)).left_alone[0].reason
        assert type(model[0]) is OtherNorm


class TestTorchModels:
    """What the replacements compute is tested where they are; here, that they are in place."""

    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_encoder(self, norm_first, grad):
        model = torch_encoder(norm_first=norm_first)
        accelerated = accelerate(copy.deepcopy(model))
        x = torch.randn(4, 9, 32)
        padding = ~torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0] * 2 + [1] * 7, [1] * 9]).bool()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.set_grad_enabled(grad):
                expected = model(x, src_key_padding_mask=padding)
                actual = accelerated(x, src_key_padding_mask=padding)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        torch.testing.assert_close(actual[~padding], expected[~padding], rtol=2e-5, atol=2e-5)
        if grad:
            for output in (actual, expected):
                output[~padding].square().sum().backward()
            for (name, ours), theirs in zip(accelerated.named_parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(
                    ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )

    def test_transformer(self):
        model = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True).eval()
        source, target = torch.randn(3, 7, 32), torch.randn(3, 5, 32)
        with torch.no_grad():
            expected = model(source, target)
            torch.testing.assert_close(accelerate(model)(source, target), expected, rtol=2e-5, atol=2e-5)

    def test_layer_norm(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        x = torch.randn(3, 8)
        expected = model(x)
        actual = accelerate(model)(x)
        assert type(model[1]) is resnorm_ext.modules.LayerNorm
        torch.testing.assert_close(actual, expected)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class TestClassesChangedAfterwards:
    def test_a_parametrized_module_stays_so(self):
        norm = accelerate(nn.LayerNorm(8))
        parametrize.register_parametrization(norm, "weight", Doubled())
        x = torch.randn(3, 8)
        expected = norm(x)
        assert restore(norm) is norm and isinstance(norm, nn.LayerNorm)
        assert not isinstance(norm, resnorm_ext.modules.LayerNorm)
        torch.testing.assert_close(norm(x), expected)
        parametrize.remove_parametrizations(norm, "weight", leave_parametrized=False)
        assert type(norm) is nn.LayerNorm

    def test_a_class_of_the_users_own_stays(self):
        class Own(nn.LayerNorm):
            pass

        norm = accelerate(nn.LayerNorm(8))
        norm.__class__ = Own
        assert type(restore(norm)) is Own


def test_restore_after_the_encoder_was_replaced():
    model = accelerate(transformers.BertModel(tiny_config()))
    model.encoder = modeling_bert.BertEncoder(tiny_config())
    restore(model)
    assert not model._forward_pre_hooks


def test_refresh_after_a_write_through_part_of_data():
    model = transformers.BertModel(tiny_config()).eval()
    accelerated, batch = accelerate(copy.deepcopy(model)), inputs()
    with torch.no_grad():
        accelerated(**batch)
        for each in (model, accelerated):
            each.encoder.layer[0].attention.self.value.weight.data[10] = 9.0
        refresh(accelerated)
        expected = model(**batch).last_hidden_state
        assert_same_at_real_positions(accelerated(**batch).last_hidden_state, expected, batch)


def test_nested_tensors_are_left_to_torch():
    norm = nn.LayerNorm(8)
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    expected = norm(nested).values()
    torch.testing.assert_close(accelerate(norm)(nested).values(), expected)


def test_an_unsupported_release_of_a_library_is_reported(monkeypatch):
    """Its models are left alone, and all others are accelerated."""
    library, name = "transformers.models.bert.modeling_bert", "bert"
    import_module = importlib.import_module

    def without_bert(module, package=None):
        if module == f".models.{name}":
            raise ImportError("cannot import name 'PreTrainedConfig'")
        return import_module(module, package)

    monkeypatch.setattr(importlib, "import_module", without_bert)
    assert library in sys.modules
    model = nn.ModuleList([nn.LayerNorm(8), transformers.BertModel(tiny_config())])
    accelerate(model)
    assert type(model[0]) is resnorm_ext.modules.LayerNorm and type(model[1].encoder) is modeling_bert.BertEncoder
    assert "PreTrainedConfig" in str(report(model))
    assert type(restore(model)[0]) is nn.LayerNorm


class TestReportOfLastingObstacles:
    def test_torch_encoder(self):
        encoder = torch_encoder()
        encoder.norm = nn.RMSNorm(32)
        assert "norm has hooks or is not a plain LayerNorm" in str(report(accelerate(encoder)))

    def test_attention_of_a_subclassed_layer(self):
        class Layer(nn.TransformerEncoderLayer):
            pass

        assert "part of a subclass of nn.TransformerEncoderLayer" in str(report(Layer(32, 4)))

    def test_bert(self):
        model = accelerate(transformers.BertModel(tiny_config()))
        model.embeddings.word_embeddings.register_forward_hook(lambda *_: None)
        model.encoder.config._attn_implementation = "flex_attention"
        text = str(report(model))
        assert "embeddings have hooks" in text and "flex_attention" in text
