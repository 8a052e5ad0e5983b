# SPDX-License-Identifier: BSD-3-Clause
"""Which way a call of an accelerated BERT takes is decided by the call, and every way gives the original's results."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from resnorm_ext.integrations import accelerate

from .conftest import assert_same_at_real_positions, inputs, tiny_config


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def compare(pair, batch, tolerance: float = 2e-5, **arguments) -> None:
    model, accelerated = pair
    expected = model(**batch, **arguments).last_hidden_state
    assert_same_at_real_positions(accelerated(**batch, **arguments).last_hidden_state, expected, batch, tolerance)


def test_grad_mode(pair, path_of):
    batch = inputs()
    with torch.enable_grad():
        reason = "grad mode is on and layer.0.attention.self.query.weight requires grad: use torch.no_grad()"
        assert path_of(pair[1], **batch) == reason
        compare(pair, batch)


def test_training(pair, path_of):
    """Where no dropout acts it changes nothing."""
    batch = inputs()
    pair[1].train()
    assert path_of(pair[1], **batch) == "packed"
    pair[1].encoder.layer[1].output.dropout.p = 0.1
    assert path_of(pair[1], **batch) == "layer.1 is in training: dropout acts"
    pair[1].eval()
    assert path_of(pair[1], **batch) == "packed"


@pytest.mark.parametrize("which", ["attention.self.dropout", "attention.output.dropout", "output.dropout"])
def test_one_dropout_in_training(pair, path_of, which):
    layer = pair[1].encoder.layer[0]
    layer.get_submodule(which).p = 0.5
    assert path_of(pair[1], **inputs()) == "packed"
    layer.get_submodule(which).train()
    layer.attention.self.train()
    assert path_of(pair[1], **inputs()) == "layer.0 is in training: dropout acts"


def test_dropout_of_the_embeddings_in_training(pair, path_of):
    """Only the encoder is packed."""
    accelerated, batch = pair[1], inputs()
    accelerated.embeddings.dropout.p = 0.5
    accelerated.embeddings.dropout.train()
    assert path_of(accelerated, **batch) == "packed"
    assert not torch.equal(accelerated(**batch).last_hidden_state, accelerated(**batch).last_hidden_state)


class TestOutputs:
    def test_hidden_states(self, pair, path_of):
        accelerated, batch = pair[1], inputs()
        for _ in range(2):
            assert path_of(accelerated, **batch) == "packed"
            reason = path_of(accelerated, **batch, output_hidden_states=True)
            assert reason == "hidden states or attention weights are asked for"
        ours, theirs = (each(**batch, output_hidden_states=True).hidden_states for each in pair)
        assert len(ours) == len(theirs) == 3
        for our_state, their_state in zip(ours, theirs, strict=True):
            assert_same_at_real_positions(our_state, their_state, batch)
        compare(pair, batch)

    def test_hidden_states_by_config(self, pair, path_of):
        pair[1].config.output_hidden_states = True
        assert path_of(pair[1], **inputs()) == "hidden states or attention weights are asked for"
        assert len(pair[1](**inputs()).hidden_states) == 3
        pair[1].config.output_hidden_states = False
        assert path_of(pair[1], **inputs()) == "packed"

    def test_attentions(self, pair, path_of):
        batch = inputs()
        for each in pair:
            each.set_attn_implementation("eager")
        reason = path_of(pair[1], **batch, output_attentions=True)
        assert reason == "hidden states or attention weights are asked for"
        ours, theirs = (each(**batch, output_attentions=True).attentions for each in pair)
        assert len(ours) == len(theirs) == 2
        torch.testing.assert_close(ours, theirs)
        assert path_of(pair[1], **batch) == "packed"

    def test_hidden_states_of_a_head(self, path_of):
        model = accelerate(transformers.BertForMaskedLM(tiny_config()).eval())
        assert len(model(**inputs(), output_hidden_states=True).hidden_states) == 3
        assert path_of(model, **inputs()) == "packed"


class TestModules:
    """Parts that are no longer as they were built."""

    @pytest.mark.parametrize(
        "name",
        [
            "encoder.layer.1",
            "encoder.layer.1.attention",
            "encoder.layer.0.attention.self",
            "encoder.layer.0.attention.self.query",
            "encoder.layer.1.attention.output",
            "encoder.layer.1.intermediate.dense",
            "encoder.layer.1.output.LayerNorm",
            "encoder.layer.1.output.dropout",
        ],
    )
    @pytest.mark.parametrize("kind", ["forward", "pre"])
    def test_hook(self, pair, path_of, name, kind):
        batch, calls = inputs(), []
        handles = []
        for each in pair:
            module = each.get_submodule(name)
            if kind == "forward":
                handles.append(module.register_forward_hook(lambda module, args, output: calls.append(module)))
            else:
                handles.append(module.register_forward_pre_hook(lambda module, args: calls.append(module)))
        assert f"{name.removeprefix('encoder.')} has hooks" in path_of(pair[1], **batch)
        compare(pair, batch)
        assert calls.count(pair[1].get_submodule(name)) == 2
        for handle in handles:
            handle.remove()
        assert path_of(pair[1], **batch) == "packed"

    @pytest.mark.parametrize("name", ["embeddings", "embeddings.LayerNorm", "embeddings.word_embeddings", "encoder"])
    def test_hook_around_the_encoder(self, pair, path_of, name):
        """It sees the padded batch; the encoder is packed all the same."""
        batch, seen = inputs(), []
        for each in pair:
            each.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append((args, output)))
        assert path_of(pair[1], **batch) == "packed"
        compare(pair, batch)
        (_, ours), (_, theirs) = seen[-1], seen[-2]
        ours, theirs = (o if isinstance(o, torch.Tensor) else o.last_hidden_state for o in (ours, theirs))
        assert_same_at_real_positions(ours, theirs, batch)

    def test_hooks_of_the_model_see_its_arguments(self, pair, path_of):
        batch, seen = inputs(), []
        pair[1].register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        pair[1].register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True)
        assert path_of(pair[1], **batch) == "packed"
        assert len(seen) == 2
        for kwargs in seen:
            assert kwargs.keys() == batch.keys()
            assert all(torch.equal(kwargs[key], batch[key]) for key in batch)

    def test_a_later_pre_hook_may_change_the_mask(self, pair, path_of):
        batch = inputs("right")

        def hide_nothing(module, args, kwargs):
            return args, kwargs | {"attention_mask": torch.ones(4, 9)}

        for each in pair:
            each.register_forward_pre_hook(hide_nothing, with_kwargs=True)
        assert path_of(pair[1], **batch) == "packed"
        ours, theirs = (each(**batch).last_hidden_state for each in pair)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)

    def test_hook_for_all_modules(self, pair, path_of):
        calls = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(module))
        try:
            assert path_of(pair[1], **inputs()) == "hooks for all modules are registered"
        finally:
            handle.remove()
        assert pair[1].encoder.layer[0].output.dense in calls

    def test_forward_of_the_instance(self, pair, path_of):
        linear = pair[1].encoder.layer[0].intermediate.dense
        linear.forward = lambda x: nn.Linear.forward(linear, x)
        assert "layer.0.intermediate.dense has hooks, a forward" in path_of(pair[1], **inputs())
        compare(pair, inputs())

    def test_parametrization(self, pair, path_of):
        for each in pair:
            torch.manual_seed(1)
            nn.utils.parametrizations.spectral_norm(each.encoder.layer[1].output.dense)
            each.eval()
        assert "layer.1.output.dense is a" in path_of(pair[1], **inputs())
        compare(pair, inputs())
        nn.utils.parametrize.remove_parametrizations(pair[1].encoder.layer[1].output.dense, "weight")
        assert path_of(pair[1], **inputs()) == "packed"
        compare(pair, inputs())

    def test_tensor_subclass_as_a_weight(self, pair, path_of):
        class Quantized(torch.Tensor):
            pass

        linear = pair[1].encoder.layer[0].output.dense
        linear.weight = nn.Parameter(linear.weight.data.as_subclass(Quantized))
        assert "layer.0.output.dense has hooks, a forward or tensors" in path_of(pair[1], **inputs())
        compare(pair, inputs())

    def test_dynamically_quantized_linears(self, pair, path_of):
        accelerated = pair[1]
        quantized = torch.ao.nn.quantized.dynamic.Linear
        dense = accelerated.encoder.layer[0].output.dense
        dense.qconfig = torch.ao.quantization.default_dynamic_qconfig
        accelerated.encoder.layer[0].output.dense = quantized.from_float(dense)
        assert "layer.0.output.dense is a torch.ao" in path_of(accelerated, **inputs())
        compare(pair, inputs(), tolerance=0.1)

    def test_lora(self, pair, path_of):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
        model, accelerated = pair
        ours = peft.get_peft_model(accelerated, config)
        theirs = peft.get_peft_model(model, config)
        theirs.load_state_dict(ours.state_dict())
        batch = inputs()
        assert "layer.0.attention.self.query is a peft." in path_of(ours, **batch)
        expected = theirs(**batch).last_hidden_state
        assert_same_at_real_positions(ours(**batch).last_hidden_state, expected, batch)
        merged = ours.merge_and_unload()
        assert path_of(merged, **batch) == "packed"
        assert_same_at_real_positions(merged(**batch).last_hidden_state, expected, batch)


class TestModes:
    def test_autocast(self, pair, path_of):
        batch = inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert path_of(pair[1], **batch) == "packed"
            theirs, ours = (each(**batch).last_hidden_state for each in pair)
        assert ours.dtype == theirs.dtype
        real = batch["attention_mask"].bool()
        exact = pair[0](**batch).last_hidden_state
        assert (ours - exact)[real].norm() <= 1.2 * (theirs - exact)[real].norm()

    def test_other_attention_implementation(self, pair, path_of):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask

        transformers.AttentionInterface.register("halved", lambda *args, **kwargs: _halved(*args, **kwargs))
        transformers.AttentionMaskInterface.register("halved", sdpa_mask)

        def _halved(*args, **kwargs):
            output, weights = sdpa_attention_forward(*args, **kwargs)
            return output / 2, weights

        batch = inputs()
        for each in pair:
            each.set_attn_implementation("halved")
        assert path_of(pair[1], **batch) == "the attention implementation is halved"
        compare(pair, batch)
        for each in pair:
            each.set_attn_implementation("sdpa")
        assert path_of(pair[1], **batch) == "packed"
        compare(pair, batch)

    def test_redefined_attention(self, pair, path_of, monkeypatch):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def negated(*args, **kwargs):
            output, weights = sdpa_attention_forward(*args, **kwargs)
            return -output, weights

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", negated)
        assert path_of(pair[1], **inputs()) == "sdpa attention has been redefined"
        compare(pair, inputs())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_to_another_dtype_and_back(self, pair, path_of, dtype):
        batch = inputs()
        accelerated = pair[1].to(dtype)
        assert path_of(accelerated, **batch) == "packed"
        assert accelerated(**batch).last_hidden_state.dtype == dtype
        assert path_of(accelerated.float(), **batch) == "packed"
        compare(pair, batch, tolerance=0.2 if dtype == torch.bfloat16 else 2e-5)

    def test_one_layer_in_another_dtype(self, pair, path_of):
        pair[1].encoder.layer[1].double()

        def call(batch):
            with pytest.raises(RuntimeError, match="same dtype"):  # torch's
                pair[1](**batch)

        assert path_of(call, inputs()) == "layer.1 is not in torch.float32, as its input"

    def test_extra_arguments(self, pair, path_of):
        assert path_of(pair[1], **inputs(), is_causal=True) == "the attention is causal"
        assert path_of(pair[1], **inputs(), use_cache=True) == "packed"

    def test_vmap(self, pair):
        x = torch.randn(3, 2, 5, 32)
        ours, theirs = (torch.func.vmap(lambda x, e=each: e.encoder(x).last_hidden_state)(x) for each in pair)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


class TestDecoders:
    """A mask of None means causal in them, not full."""

    def pair(self, **config):
        model = transformers.BertLMHeadModel(tiny_config(is_decoder=True, **config)).eval()
        return model, accelerate(copy.deepcopy(model))

    def test_without_a_mask(self):
        model, accelerated = self.pair()
        ids = inputs("none")["input_ids"]
        torch.testing.assert_close(accelerated(ids).logits, model(ids).logits, rtol=2e-5, atol=2e-5)

    def test_generation_with_a_cache(self):
        model, accelerated = self.pair(eos_token_id=None)
        ids = inputs("none")["input_ids"]
        ours, theirs = (each.generate(ids, max_new_tokens=5, do_sample=False) for each in (accelerated, model))
        assert torch.equal(ours, theirs)

    def test_cross_attention(self):
        model, accelerated = self.pair(add_cross_attention=True)
        batch = inputs("right")
        states = torch.randn(4, 6, 32)
        arguments = {"encoder_hidden_states": states, "encoder_attention_mask": torch.ones(4, 6)}
        ours, theirs = (each(**batch, **arguments).logits for each in (accelerated, model))
        assert_same_at_real_positions(ours, theirs, batch)

    def test_config_that_turns_a_model_into_a_decoder(self, pair, path_of):
        for each in pair:
            each.config.is_decoder = True
        batch = inputs("none")
        assert path_of(pair[1], **batch, use_cache=False) == "the attention is causal"
        compare(pair, batch, use_cache=False)

    def test_causal_attention_of_one_layer(self, pair, path_of):
        for each in pair:
            each.encoder.layer[1].attention.self.is_causal = True
        batch = inputs("none")
        assert path_of(pair[1], **batch) == "layer.1 is a decoder's"
        compare(pair, batch)


class TestParts:
    def test_encoder_alone(self, pair, path_of):
        x = torch.randn(3, 5, 32)
        before = x.clone()
        assert path_of(pair[1].encoder, x) == "packed"
        ours, theirs = (each.encoder(x).last_hidden_state for each in pair)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        assert torch.equal(x, before)

    def test_layer_alone(self, pair):
        x = torch.randn(3, 5, 32)
        ours, theirs = (each.encoder.layer[0](x) for each in pair)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)

    def test_embeddings_alone(self, pair):
        ids = inputs()["input_ids"]
        pair[1](ids)
        torch.testing.assert_close(pair[1].embeddings(ids), pair[0].embeddings(ids))

    def test_a_forward_that_uses_the_embeddings_otherwise(self, path_of):
        """Nothing is handed over to a forward that is not BertModel's."""

        class Shifted(transformers.BertModel):
            def forward(self, input_ids, attention_mask=None):
                return self.encoder(self.embeddings(input_ids) + 1.0)

        model = Shifted(tiny_config()).eval()
        accelerated = accelerate(copy.deepcopy(model))
        ids = inputs()["input_ids"]
        assert path_of(accelerated, ids) == "packed"
        ours, theirs = (each(ids).last_hidden_state for each in (accelerated, model))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


class TestOverrides:
    """Methods that the original would call are called."""

    def test_masks_of_the_model(self, pair):
        def no_mask(self, *args, **kwargs):
            return None, None

        for each in pair:
            each._create_attention_masks = no_mask.__get__(each)
        compare(pair, inputs())

        class Subclass(transformers.BertModel):
            _create_attention_masks = no_mask

        model = Subclass(tiny_config()).eval()
        compare((model, accelerate(copy.deepcopy(model))), inputs())

    def test_feed_forward_of_a_layer(self, pair):
        for each in pair:
            each.encoder.layer[0].feed_forward_chunk = lambda attention_output: torch.tanh(attention_output)
        compare(pair, inputs())

    @pytest.mark.parametrize("name", ["attention.self.query", "output.LayerNorm"])
    def test_weights_that_are_not_parameters(self, pair, path_of, name):
        for each in pair:
            module = each.encoder.layer[1].get_submodule(name)
            weight = module.weight.detach()
            del module.weight
            module.register_buffer("weight", weight)
        assert "weight" in path_of(pair[1], **inputs())
        compare(pair, inputs())


def test_global_hooks_see_every_module(pair):
    calls = {True: [], False: []}
    for each in pair:
        names = {module: name for name, module in each.named_modules()}
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, names=names, ours=each is pair[1]: calls[ours].append(names[module])
        )
        try:
            each(**inputs())
        finally:
            handle.remove()
    assert calls[True] == calls[False]


def test_fake_tensors(pair):
    """No value is read, whatever the mode."""
    for grad in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(grad):
            batch = {name: mode.from_tensor(tensor) for name, tensor in inputs().items()}
            assert pair[1](**batch).last_hidden_state.shape == (4, 9, 32)


def test_forward_derivatives_without_grad(pair):
    embeddings, tangent = torch.randn(2, 4, 9, 32, dtype=torch.float64)
    tangents = []
    for each in pair:
        each.double().set_attn_implementation("eager")
        with forward_ad.dual_level():
            output = each(inputs_embeds=forward_ad.make_dual(embeddings, tangent)).last_hidden_state
            tangents.append(forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(*tangents)


def test_another_default_device(pair):
    batch = inputs()
    expected = pair[0](**batch).last_hidden_state
    with torch.device("meta"):
        output = accelerate(copy.deepcopy(pair[0]))(**batch).last_hidden_state
    assert_same_at_real_positions(output, expected, batch)


def test_bool_masks_with_eager_attention(pair, path_of):
    """That adds them to the scores."""
    for each in pair:
        each.set_attn_implementation("eager")
    hidden, mask = torch.randn(4, 9, 32), torch.rand(4, 1, 1, 9).expand(4, 1, 9, 9) > 0.5
    assert "bool" in path_of(pair[1].encoder, hidden, mask)
    outputs = [each.encoder(hidden, mask).last_hidden_state for each in pair]
    torch.testing.assert_close(*outputs)
