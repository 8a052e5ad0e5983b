# SPDX-License-Identifier: BSD-3-Clause
"""Adapters, and whatever else is in the place of a linear layer or around it, in training on packed batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from .packed_cases import (
    FAMILIES,
    assert_trains_alike,
    batch_of,
    build,
    encoder_model,
    layers_of,
    pair_of,
    sequence_loss,
    step,
)

close = torch.testing.assert_close


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


_LINEARS = ".*(query|value|[qv]_lin)"
ADAPTERS = {
    "LoRA": lambda peft: peft.LoraConfig(r=4, target_modules=_LINEARS),
    "LoRA of all linear layers": lambda peft: peft.LoraConfig(r=4, target_modules="all-linear", bias="all"),
    "LoRA with the head": lambda peft: peft.LoraConfig(r=4, target_modules=_LINEARS, task_type="SEQ_CLS"),
    "DoRA": lambda peft: peft.LoraConfig(r=4, target_modules=_LINEARS, use_dora=True),
    "LoHa": lambda peft: peft.LoHaConfig(r=4, target_modules=_LINEARS),
    "IA3": lambda peft: peft.IA3Config(target_modules=_LINEARS, feedforward_modules=[]),
    "prompt tuning": lambda peft: peft.PromptTuningConfig(
        num_virtual_tokens=3, task_type="SEQ_CLS", token_dim=32, num_layers=2, num_attention_heads=4
    ),
}


def adapt(peft, model: nn.Module, kind: str = "LoRA") -> nn.Module:
    """With the same adapters for every model, which do something from the start."""
    torch.manual_seed(7)
    adapted = peft.get_peft_model(model, ADAPTERS[kind](peft))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.train()


class TestAdapters:
    @pytest.fixture(scope="class")
    def peft(self):
        return pytest.importorskip("peft")

    @pytest.mark.parametrize("kind", ADAPTERS)
    def test_adapters_train(self, peft, family, kind):
        if (family, kind) == ("ELECTRA", "prompt tuning"):
            pytest.skip("peft's prompts are as wide as the layers, not as the embeddings")
        pair = [adapt(peft, each, kind) for each in pair_of(build(family))]
        assert_trains_alike(pair, sequence_loss())

    def test_a_model_that_has_them_already(self, peft, family):
        assert_trains_alike(pair_of(adapt(peft, build(family))), sequence_loss())

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_with_checkpointing(self, peft, use_reentrant):
        pair = [adapt(peft, each) for each in pair_of(build())]
        for each in pair:
            each.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_trains_alike(pair, sequence_loss())

    def test_inference_between_steps_sees_what_was_learnt(self, peft):
        pair = [adapt(peft, each) for each in pair_of(build(initializer_range=0.1))]
        batch, loss = batch_of(), sequence_loss()
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in pair]
        for merged in (False, False, True):
            for each, optimizer in zip(pair, optimizers, strict=True):
                step(each.train(), loss)
                optimizer.step()
            pair = [each.merge_and_unload() if merged else each for each in pair]
            with torch.no_grad():
                close(*(each.eval()(**batch).logits for each in pair), rtol=1e-4, atol=1e-4)

    def test_an_adapter_for_each_sequence(self, peft):
        """Which peft tells by its place in the batch. It is for eval mode, where grad mode may be on."""
        batch, outputs = batch_of(), []
        for each in pair_of(build()):
            adapted = adapt(peft, each)
            adapted.add_adapter("another", peft.LoraConfig(r=4, target_modules=_LINEARS, init_lora_weights=False))
            outputs.append(adapted.eval()(**batch, adapter_names=["default", "another", "__base__", "default"]).logits)
        close(*outputs, rtol=2e-5, atol=2e-5)


class TestOtherLinears:
    """In the place of a linear layer, or around it."""

    @pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
    def test_parametrizations(self, kind):
        model = build()
        getattr(nn.utils.parametrizations, kind)(layers_of(model)[0].attention.self.value)
        assert_trains_alike(pair_of(model), sequence_loss())

    def test_pruned_weights(self):
        pair = pair_of(build())
        for each in pair:
            nn.utils.prune.l1_unstructured(layers_of(each)[0].output.dense, "weight", 0.3)
        assert_trains_alike(pair, sequence_loss())

    def test_one_that_reads_other_positions(self):
        class Centred(nn.Linear):
            def forward(self, x):
                return super().forward(x - x.mean(1, keepdim=True))

        pair = pair_of(build())
        for each in pair:
            attention = layers_of(each)[0].attention.self
            centred = Centred(32, 32)
            centred.load_state_dict(attention.query.state_dict())
            attention.query = centred
        assert_trains_alike(pair, sequence_loss(), None)

    def test_hooks(self):
        """Of a linear layer: they see what the original's would, since they may read other positions."""
        pair, shapes = pair_of(build()), []
        for each in pair:
            linear = layers_of(each)[1].output.dense
            linear.register_forward_hook(lambda *args: shapes.append(args[2].shape) or 2 * args[2])
            linear.register_full_backward_hook(lambda *args: (3 * args[1][0],))
        assert_trains_alike(
            pair, sequence_loss(), {("original", "layer.1.output.dense has hooks, a forward or tensors of its own")}
        )
        assert shapes == [(4, 9, 32), (4, 9, 32)]

    def test_a_dropout_that_adapters_alone_have(self):
        """A pass without grad drops what the pass with grad does from the same state of the generator."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=_LINEARS, lora_dropout=0.3, init_lora_weights=False)
        model, outputs = pair_of(peft.get_peft_model(build(), config))[1].train(), []
        for mode in (torch.no_grad, torch.enable_grad):
            torch.manual_seed(0)
            with mode():
                outputs.append(model(**batch_of()).logits.detach())
        torch.testing.assert_close(*outputs, rtol=2e-5, atol=2e-5)

    def test_what_a_hook_keeps_stays_as_it_was(self):
        """In the computation without grad of a checkpointed layer, too."""
        model, kept = pair_of(build())[1], []
        model.gradient_checkpointing_enable({"use_reentrant": True})
        layers_of(model)[0].output.dense.register_forward_hook(lambda *args: kept.append((args[2], args[2].clone())))
        sequence_loss()(model)
        assert kept and all(torch.equal(*each) for each in kept)

    def test_embeddings_that_share_gradients_by_frequency(self):
        """Padding counts as well."""
        model = build()
        for name in ("word", "position", "token_type"):
            encoder_model(model).embeddings.get_submodule(f"{name}_embeddings").scale_grad_by_freq = True
        assert_trains_alike(pair_of(model), sequence_loss(), None)
